//! `vmm.ping` on a kept connection, client by client.

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use rewake_rivals::{Ours, Server, Theirs, runtime};

fn ping(criterion: &mut Criterion) {
    let mut servers = vec![Server::responder()];
    match Server::cloud_hypervisor() {
        Ok(server) => servers.push(server),
        Err(reason) => eprintln!("SKIP cloud-hypervisor: {reason}"),
    }
    for server in &servers {
        let mut group = criterion.benchmark_group(format!("ping {}", server.name));
        let mut ours = Ours::connect(&server.socket());
        group.bench_function("rewake", |bencher| bencher.iter(|| ours.ping()));
        let theirs = Theirs::new(&server.socket());
        let runtime = runtime();
        group.bench_function("cloud-hypervisor-client", |bencher| {
            bencher.iter_custom(|calls| runtime.block_on(timed(&theirs, calls)));
        });
        group.finish();
    }
}

/// The whole loop inside the runtime, so that entering it is not counted.
async fn timed(theirs: &Theirs, calls: u64) -> Duration {
    let begin = Instant::now();
    for _ in 0..calls {
        theirs.ping().await;
    }
    begin.elapsed()
}

criterion_group!(benches, ping);
criterion_main!(benches);
