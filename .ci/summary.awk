# Reads the output of go test -v for any number of packages. Prints one line for
# each package, the output of tests that failed and the names of those that were
# skipped. Writes to the file that the variable sum names what failed, once more and
# shortened for those who see only the end of a long log, and: N passed, N failed,
# N skipped.
#
# Tests and subtests count. A package that fails without a failed test (it does
# not compile, or it panics) counts as one. A package may run on several kernels,
# as "path" and "path [Linux 6.1]": what one lacks, another may have, so a test
# counts as skipped only if it passed on none. Exits with 1 unless all passed.

# recall keeps the ends of what a failure said, for the sum.
function recall(who, text,    lines, n, i) {
	n = split(text, lines, "\n") - 1
	recalled = recalled "FAILED: " who "\n"
	for (i = 1; i <= n; i++) {
		if (i <= 8 || i > n - 8) recalled = recalled "  " substr(lines[i], 1, 300) "\n"
		else if (i == 9) recalled = recalled "  (" n - 16 " lines left out)\n"
	}
}

# A test's output follows its name (cmd/internal/test2json).
/^=== (RUN|CONT|NAME|PAUSE) / { test = $3; next }

# A test may have printed the beginning of the line.
match($0, /--- (PASS|FAIL|SKIP): /) {
	verdict = substr($0, RSTART + 4, 4)
	name = substr($0, RSTART + RLENGTH)
	sub(/ \([0-9.]+s\)$/, "", name)
	count[verdict]++
	here[verdict]++
	if (verdict == "FAIL") failed[++failures] = name
	if (verdict == "PASS") passes[++passed] = name
	if (verdict == "SKIP") skipped[++skips] = name
	test = name # what follows explains it, up to the next name
	next
}

/^(ok  |FAIL|---|\?   )\t/ {
	split($0, field, "\t")
	package = field[2]
	if ($1 == "FAIL") {
		if (!here["FAIL"]) count["FAIL"]++
		print
		printf "%s", said[""] # build errors
		if (!failures) {
			if (test != "") printf "%s", said[test] # a panic, in whichever test spoke last
			recall(package, test == "" ? said[""] : said[test])
		}
		for (i = 1; i <= failures; i++) {
			printf "--- FAIL: %s %s\n%s", package, failed[i], said[failed[i]]
			recall(package " " failed[i], said[failed[i]])
		}
	} else if ($1 == "ok") {
		printf "ok   %-24s %5d passed  %s\n", package, here["PASS"], field[3]
	}
	path = package
	sub(/ \[.*/, "", path)
	for (i = 1; i <= passed; i++) ran[path, passes[i]] = 1
	for (i = 1; i <= skips; i++) {
		n = ++open
		what[n] = package " " skipped[i] "\n" said[skipped[i]]
		which[n] = path SUBSEP skipped[i]
	}
	fflush()
	delete said; delete here; delete failed; delete skipped; delete passes
	failures = skips = passed = 0
	test = ""
	next
}

/^(PASS|FAIL|coverage: .*|exit status [0-9]+)$/ { test = ""; next }

{ said[test] = said[test] $0 "\n" }

END {
	printf "%s", said[""]
	for (i = 1; i <= open; i++) {
		if (which[i] in ran) continue
		printf "SKIPPED: %s", what[i]
		left++
	}
	printf "%s%d passed, %d failed, %d skipped\n", recalled, count["PASS"], count["FAIL"], left >sum
	exit count["PASS"] == 0 || count["FAIL"] > 0 || left > 0
}
