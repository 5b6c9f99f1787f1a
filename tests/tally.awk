# Reads what one libtest binary printed with --show-output and writes one line
# per test: result, place, suite, test, remark, separated by tabs. A test that
# printed `SKIP name: reason` counts as skipped although libtest says ok.
#
#     awk -v place=native -v suite=rewake -v exit_code=0 -f tally.awk LOG

BEGIN { OFS = "\t"; count = 0; finished = 0; section = ""; reports = "" }

function note_skip(line,    name, reason, at) {
    sub(/^.*SKIP[: ]+/, "", line)
    at = index(line, ": ")
    name = at ? substr(line, 1, at - 1) : ""
    reason = at ? substr(line, at + 2) : line
    if (section != "")
        skipped[section] = reason
    else
        loose[name] = reason
}

# The name of a test as libtest prints it may carry a remark of its own.
function plain(name) {
    sub(/ - should panic$/, "", name)
    return name
}

function add(name, result, remark) {
    if (!(name in results)) order[count++] = name
    results[name] = result
    remarks[name] = remark
}

{ gsub(/\t/, " "); sub(/\r$/, "") }

/^test .* \.\.\. / {
    section = ""
    line = substr($0, 6)
    at = index(line, " ... ")
    name = plain(substr(line, 1, at - 1))
    rest = substr(line, at + 5)
    if (rest ~ /^ok/) add(name, "passed", "")
    else if (rest ~ /^FAILED/) add(name, "failed", "")
    else if (rest ~ /^ignored/) {
        sub(/^ignored(, )?/, "", rest)
        add(name, "skipped", rest == "" ? "ignored" : rest)
    } else {
        # With one thread the output of the test stands between name and result.
        add(name, "unknown", "no result")
        pending = name
        if (rest ~ /SKIP /) { section = name; note_skip(rest); section = "" }
    }
    next
}
pending != "" && /^(ok|FAILED)( <.*>)?$/ {
    add(pending, /^ok/ ? "passed" : "failed", "")
    pending = ""
    next
}
/^---- .* stdout ----$/ {
    section = plain(substr($0, 6, length($0) - 17))
    next
}
/^(successes|failures):$/ { section = ""; next }
/(^|[^A-Za-z])SKIP [A-Za-z0-9_:]+: / {
    if (pending != "") { section = pending; note_skip($0); section = "" }
    else note_skip($0)
    next
}
section != "" && / panicked at / { panic = section; next }
section != "" && panic == section && $0 != "" {
    if (remarks[section] == "") remarks[section] = substr($0, 1, 200)
    panic = ""
}
/^test result: / { finished = 1 }

END {
    for (name in loose)
        for (i = 0; i < count; i++) {
            full = order[i]
            if (full == name || (length(full) > length(name) + 2 && \
                substr(full, length(full) - length(name) - 1) == "::" name))
                skipped[full] = loose[name]
        }
    for (i = 0; i < count; i++) {
        name = order[i]
        if (results[name] == "passed" && (name in skipped)) {
            results[name] = "skipped"
            remarks[name] = skipped[name]
        }
        if (results[name] == "unknown") results[name] = "failed"
        print results[name], place, suite, name, remarks[name]
    }
    if (!finished)
        print "failed", place, suite, "(the binary itself)", \
            exit_code == 124 || exit_code == 137 ? "ran into its time limit" : "ended with " exit_code " before it could report"
    else if (exit_code != 0 && exit_code != 101)
        print "failed", place, suite, "(the binary itself)", "reported, then ended with " exit_code
}
