package config

import "strings"

// closest returns the choice that word was probably meant to be, or "". Case and
// the difference between - and _ do not count. Of equally close choices the
// first wins.
func closest(word string, choices []string) string {
	const longest = 64 // keys and names are shorter; longer text is no typing slip
	if len(word) > longest {
		return ""
	}
	word = fold(word)
	best, bestDistance := "", max(1, len(word)/3)+1
	for _, c := range choices {
		if d := distance(word, fold(c), bestDistance); d < bestDistance {
			best, bestDistance = c, d
		}
	}
	return best
}

func fold(s string) string { return strings.ReplaceAll(strings.ToLower(s), "-", "_") }

// didYouMean is closest as a phrase, or "".
func didYouMean(word string, choices []string) string {
	if c := closest(word, choices); c != "" {
		return "did you mean " + quote(c) + "?"
	}
	return ""
}

// distance counts the insertions, deletions, substitutions and swaps of
// neighbours that turn a into b (optimal string alignment). It may stop
// counting at limit.
func distance(a, b string, limit int) int {
	if len(a)-len(b) >= limit || len(b)-len(a) >= limit {
		return limit
	}
	// Three rows of the dynamic programme: two back, one back, current.
	older, old, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range old {
		old[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(old[j]+1, row[j-1]+1, old[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], older[j-2]+1)
			}
		}
		older, old, row = old, row, older
	}
	return old[len(b)]
}

// list joins choices as prose: "a, b or c".
func list(choices []string) string {
	n := len(choices)
	if n < 2 {
		return strings.Join(choices, "")
	}
	return strings.Join(choices[:n-1], ", ") + " or " + choices[n-1]
}
