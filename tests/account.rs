//! The counting behind `tests/run`: a skipped test is never counted as passed, and a
//! test binary that dies is never counted as nothing.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

use std::io::Write;
use std::process::{Command, Stdio};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Runs one of the awk programs under `tests/`, or says why it cannot.
fn awk(test: &str, program: &str, variables: &[&str], input: &str) -> Option<(String, bool)> {
    let mut command = Command::new("awk");
    for variable in variables {
        command.args(["-v", variable]);
    }
    command
        .args(["-f", program])
        .current_dir(format!("{ROOT}/tests"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let Ok(mut child) = command.spawn() else {
        eprintln!("SKIP {test}: awk is not installed");
        return None;
    };
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    Some((
        String::from_utf8(output.stdout).unwrap(),
        output.status.success(),
    ))
}

const END: &str =
    "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";

#[test]
fn tallies_what_a_test_binary_printed() {
    let dead = "failed\tnative\ts\t(the binary itself)\tended with 139 before it could report\n";
    let cases = [
        (
            "passed",
            format!("test a::b ... ok\n{END}\n"),
            0,
            "passed\tnative\ts\ta::b\t\n".to_owned(),
        ),
        (
            "skipped, said in its own section",
            format!(
                "test a::b ... ok\nsuccesses:\n---- a::b stdout ----\nSKIP b: no /dev/kvm\n{END}\n"
            ),
            0,
            "skipped\tnative\ts\ta::b\tno /dev/kvm\n".to_owned(),
        ),
        (
            "skipped, said past the test harness",
            format!("test a::b ... ok\ntest a::bb ... ok\n{END}\nSKIP b: not root\n"),
            0,
            "skipped\tnative\ts\ta::b\tnot root\npassed\tnative\ts\ta::bb\t\n".to_owned(),
        ),
        (
            "skipped, with one thread",
            format!("test a::b ... SKIP b: not root\nok\n{END}\n"),
            0,
            "skipped\tnative\ts\ta::b\tnot root\n".to_owned(),
        ),
        (
            "a failure stays one although it also skipped",
            format!(
                "test b ... FAILED\nfailures:\n---- b stdout ----\nSKIP b: half\nthread 'b' panicked at x.rs:1:1:\nno good\n{END}\n"
            ),
            101,
            "failed\tnative\ts\tb\tno good\n".to_owned(),
        ),
        (
            "ignored",
            format!("test b ... ignored, slow\n{END}\n"),
            0,
            "skipped\tnative\ts\tb\tslow\n".to_owned(),
        ),
        (
            "expected panic",
            format!("test b - should panic ... ok\n{END}\n"),
            0,
            "passed\tnative\ts\tb\t\n".to_owned(),
        ),
        (
            "died between tests",
            "test b ... ok\n".to_owned(),
            139,
            format!("passed\tnative\ts\tb\t\n{dead}"),
        ),
        (
            "died in a test",
            "test b ... ".to_owned(),
            139,
            format!("failed\tnative\ts\tb\tno result\n{dead}"),
        ),
        (
            "ran out of time",
            "running 1 test\n".to_owned(),
            137,
            "failed\tnative\ts\t(the binary itself)\tran into its time limit\n".to_owned(),
        ),
    ];
    for (name, printed, code, wanted) in cases {
        let variables = ["place=native", "suite=s", &format!("exit_code={code}")];
        let Some((tallied, _)) = awk(
            "tallies_what_a_test_binary_printed",
            "tally.awk",
            &variables,
            &printed,
        ) else {
            return;
        };
        assert_eq!(tallied, wanted, "{name}");
    }
}

#[test]
fn counts_a_test_once_over_all_places() {
    let cases = [
        (
            "skipped here, ran there",
            "skipped\tnative\ts\tvm_a\twhy\npassed\tmachine\ts\tvm_a\t\n",
            "1 passed, 0 failed, 0 skipped",
            true,
        ),
        (
            "failed in one place",
            "passed\tnative\ts\ta\t\nfailed\tmachine\ts\ta\tno\n",
            "0 passed, 1 failed, 0 skipped",
            false,
        ),
        (
            "failed first",
            "failed\tnative\ts\ta\tno\npassed\tmachine\ts\ta\t\n",
            "0 passed, 1 failed, 0 skipped",
            false,
        ),
        (
            "skipped everywhere",
            "skipped\tnative\ts\ta\tno\nskipped\tmachine\ts\ta\tno\n",
            "0 passed, 0 failed, 1 skipped",
            true,
        ),
        (
            "same name in two suites",
            "passed\tnative\ts\ta\t\npassed\tnative\tt\ta\t\n",
            "2 passed, 0 failed, 0 skipped",
            true,
        ),
    ];
    for (name, results, wanted, success) in cases {
        let Some((account, ok)) = awk(
            "counts_a_test_once_over_all_places",
            "account.awk",
            &[],
            results,
        ) else {
            return;
        };
        assert_eq!(account.lines().last(), Some(wanted), "{name}");
        assert_eq!(ok, success, "{name}");
    }
}
