//! `rewake recover`: puts right what dead programs and restarts of the machine left behind.

use clap::Args;
use rewake::host::Census;
use rewake::ids::SandboxId;
use serde_json::{Value, json};

use crate::cli::failure::Kind;
use crate::cli::host::HostArgs;
use crate::cli::progress::Progress;
use crate::cli::{Failure, Global, report};

#[derive(Debug, Args)]
#[command(
    after_long_help = "JSON: ids: adopted (they run), paused, reclaimed (half made or half \
    removed, and gone now), lost, under_way (somebody is at work with them), silent (their \
    agents do not answer); stuck: sandbox_id and error of each; texts: swept (gone now), foreign \
    (left alone), remains (could not be removed)"
)]
pub(in crate::cli) struct RecoverArgs {
    #[command(flatten)]
    host: HostArgs,
}

/// `rewake recover`.
pub(in crate::cli) fn recover(args: &RecoverArgs, global: Global) -> Result<(), Failure> {
    let host = args.host.open()?;
    let progress = Progress::start("recover", !global.json);
    let deadline = args.host.deadline()?;
    let census = host.ready(deadline).and_then(|()| host.recover(deadline));
    drop(progress);
    let census = census?;
    if global.json {
        report::json(&document(&census))?;
    } else {
        show(&census)?;
    }
    if census.is_clean() {
        Ok(())
    } else {
        Err(Failure::Told(Kind::Failed))
    }
}

/// The lists of ids, with the words for people.
fn lists(census: &Census) -> [(&'static str, &'static str, &[SandboxId]); 6] {
    [
        ("adopted", "they run", &census.adopted),
        ("paused", "they can be resumed", &census.paused),
        (
            "reclaimed",
            "half made or half removed: gone",
            &census.reclaimed,
        ),
        ("lost", "their VMs ended without a snapshot", &census.lost),
        (
            "under_way",
            "somebody is at work with them",
            &census.under_way,
        ),
        (
            "silent",
            "they run, their agents do not answer",
            &census.silent,
        ),
    ]
}

fn document(census: &Census) -> Value {
    let mut document = json!({
        "stuck": census.stuck.iter().map(|(id, error)| json!({
            "sandbox_id": id.as_str(),
            "error": report::error_document(error),
        })).collect::<Vec<_>>(),
        "swept": census.swept,
        "foreign": census.foreign,
        "remains": census.remains.iter().map(ToString::to_string).collect::<Vec<_>>(),
    });
    for (key, _, ids) in lists(census) {
        document[key] = json!(ids);
    }
    document
}

fn show(census: &Census) -> Result<(), Failure> {
    let joined = |ids: &[SandboxId]| {
        let ids: Vec<&str> = ids.iter().map(SandboxId::as_str).collect();
        ids.join(" ")
    };
    let row = |(key, meaning, ids): (&str, &str, &[SandboxId])| {
        let key = key.replace('_', " ");
        vec![key, ids.len().to_string(), meaning.to_owned(), joined(ids)]
    };
    let mut rows: Vec<_> = lists(census).into_iter().map(row).collect();
    let stuck: Vec<&str> = census.stuck.iter().map(|(id, _)| id.as_str()).collect();
    rows.push(vec![
        "stuck".to_owned(),
        stuck.len().to_string(),
        "they could not be put right".to_owned(),
        stuck.join(" "),
    ]);
    report::table(&["sandboxes", "n", "meaning", "which"], &rows)?;
    for (what, texts) in [("gone", &census.swept), ("left alone", &census.foreign)] {
        for text in texts {
            println!("{what}: {text}");
        }
    }
    for remains in &census.remains {
        println!("could not be removed: {remains}");
    }
    for (_, error) in &census.stuck {
        eprintln!("rewake: {}", report::words(error));
    }
    Ok(())
}
