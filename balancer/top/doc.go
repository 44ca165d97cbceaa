// Package top is the screen of nlb top: what it shows, and what its keys do.
//
//	Status, Status ──Take──► picture: rates, sums ──┐
//	       keys ────Press──► sort, filter, cursor ──┴─► rows ──Lines──► width × height
//	                   └──► Action: drain, undrain, look again, quit
//
// All of it is pure: times, answers of the daemon and keys are arguments, lines
// are the result. Whoever owns the terminal and the socket calls Take or Fail with
// each answer, Press with each key, does what the Action says, and draws Lines.
//
// Rates are differences of two answers' counters; see perSecond for counters that
// begin anew. The text alone says everything: styles repeat what words say.
//
// An answer is arranged once: a key that moves the cursor touches no more than the
// lines that are on the screen, however many targets there are.
package top
