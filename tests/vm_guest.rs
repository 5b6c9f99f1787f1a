//! The test machine itself: what the other `vm_` tests rely on.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

mod machine;

use machine::{BOOT_LIMIT, Guest, Namespace, SHELL_PORT, Scratch, Vm, plain_options};

/// The ground truth for every restore test: Cloud Hypervisor alone, without rewake, brings
/// the guest back with its memory. If this fails, nothing else here means anything.
#[test]
fn vm_cloud_hypervisor_alone_restores_the_guest() {
    if !machine::inside_with_vmm("vm_cloud_hypervisor_alone_restores_the_guest") {
        return;
    }
    let scratch = Scratch::new("alone");
    let namespace = Namespace::new("rwtest-alone");
    let guest = Guest(&namespace);
    let disk = scratch.disk("disk.raw", 64 << 20);

    let vm = Vm::start(&namespace, &scratch, &plain_options(&disk, &scratch));
    guest.await_answer(SHELL_PORT, "/nonce", BOOT_LIMIT);
    let nonce = guest.nonce();
    guest.shell("echo kept >/disk/file && sync");
    let count = guest.counter();
    let snapshot = scratch.join("snapshot");
    vm.snapshot(&snapshot);
    vm.shut_down();

    for mode in ["Copy", "OnDemand"] {
        let vm = Vm::start(&namespace, &scratch, &[]);
        let body = serde_json::json!({
            "source_url": format!("file://{}", snapshot.display()),
            "memory_restore_mode": mode,
            "resume": true,
        });
        vm.api("PUT", "vm.restore", &body.to_string());
        assert_eq!(guest.nonce(), nonce, "{mode}");
        guest.await_counter_above(count);
        guest.check_pattern();
        assert_eq!(guest.shell("cat /disk/file"), "kept", "{mode}");
        assert_eq!(vm.api("GET", "vm.info", "")["state"], "Running", "{mode}");
        vm.shut_down();
    }
}

/// The positive control of the nonce: a second boot has another one.
#[test]
fn vm_a_rebooted_guest_has_another_nonce() {
    if !machine::inside_with_vmm("vm_a_rebooted_guest_has_another_nonce") {
        return;
    }
    let scratch = Scratch::new("reboot");
    let namespace = Namespace::new("rwtest-reboot");
    let guest = Guest(&namespace);
    let disk = scratch.disk("disk.raw", 16 << 20);
    let mut nonces = Vec::new();
    for _ in 0..2 {
        let vm = Vm::start(&namespace, &scratch, &plain_options(&disk, &scratch));
        guest.await_answer(SHELL_PORT, "/nonce", BOOT_LIMIT);
        nonces.push(guest.nonce());
        vm.shut_down();
    }
    assert_ne!(nonces[0], nonces[1]);
}
