# Closes a run: reads result lines (see tally.awk) of all places, prints what
# failed, what was skipped, what ran for real, and as the last line
# `N passed, N failed, N skipped`. A test counts once: failed if it failed
# anywhere, else passed if it ran for real anywhere, else skipped.

BEGIN { FS = "\t" }

# What a test that ran shows by its name and place to have been used for real.
function uses(place, suite, name,    what) {
    what = suite " " name
    place = place == "machine" ? "in the test machine" : "on this machine"
    if (name ~ /(^|::)(root_)?kvm_[^:]*$/) real["Cloud Hypervisor with a tiny guest on KVM, " place]++
    if (name ~ /(^|::)vm_[^:]*$/) real["Cloud Hypervisor with a Linux guest on KVM, " place]++
    if (name ~ /(^|::)(root|vm)_/) {
        if (what ~ /net|slot|nft|nat|tap|tun|veth/) real["network namespaces, links, nf_tables, " place]++
        if (what ~ /disk|loop|(^|[^a-z])dm([^a-z]|$)|cow/) real["loop devices and device-mapper, " place]++
    }
    if (what ~ /(^|[^a-z])(sim|demo|stand_in)([^a-z]|$)/) standin["Cloud Hypervisor and its guest (rewake-sim)"]++
}

{
    key = $3 SUBSEP $4
    if (!(key in result)) order[count++] = key
    if ($1 == "failed" || !(key in result) || (result[key] == "skipped" && $1 == "passed")) {
        result[key] = $1
        remark[key] = $5
        where[key] = $2
    }
    if ($1 == "passed") uses($2, $3, $4)
}

END {
    for (i = 0; i < count; i++) {
        key = order[i]
        split(key, part, SUBSEP)
        total[result[key]]++
        if (result[key] == "passed" && remark[key] ~ /only when run again/)
            shaky = shaky sprintf("  %s %s (%s)\n", part[1], part[2], where[key])
        if (result[key] == "failed")
            failures = failures sprintf("  %s %s (%s)%s\n", part[1], part[2], where[key], remark[key] == "" ? "" : ": " remark[key])
        if (result[key] == "skipped") {
            why = remark[key]
            if (!(why in skips)) reasons[kinds++] = why
            skips[why] = skips[why] sprintf("    %s %s\n", part[1], part[2])
        }
    }
    print "\nRan for real:"; fflush()
    n = 0
    for (what in real) { printf "  %s (%d tests)\n", what, real[what] | "sort"; n++ }
    close("sort")
    if (!n) print "  nothing that needs privileges, KVM or Cloud Hypervisor"
    print "Ran on the stand-in:"
    n = 0
    for (what in standin) { printf "  %s (%d tests)\n", what, standin[what]; n++ }
    print "  envd (the agent of the stand-in, never the original)"
    if (kinds) print "Skipped:"
    for (i = 0; i < kinds; i++) printf "  %s\n%s", reasons[i], skips[reasons[i]]
    if (shaky != "") printf "Failed beside others, passed when run again alone:\n%s", shaky
    if (failures != "") printf "Failed:\n%s", failures
    printf "\n%d passed, %d failed, %d skipped\n", total["passed"], total["failed"], total["skipped"]
    exit total["failed"] > 0
}
