package verify

import (
	"bytes"

	"nlb/proxyproto"
)

// judge compares the answers of the two connections. For Undecided it also says
// what they may mean.
func judge(c Check, with, without answer) (Kind, string) {
	switch {
	case bytes.HasPrefix(with.data, proxyproto.AppendLocal(nil)):
		return Refused, "the server took the header for data, and sent it back"
	case without.err != nil:
		return Undecided, "there was nothing to compare with"
	case c == TCP:
		return judgeTCP(with, without)
	default:
		return judgeServed(with, without)
	}
}

// judgeServed is for the protocols in which an answer says that the server saw a
// request. Any will do: an error of the service proves as much as its success.
func judgeServed(with, without answer) (Kind, string) {
	w, n := with.grade(), without.grade()
	switch {
	case w == served && n == served:
		return Accepted, ""
	case w > n:
		return Required, ""
	case w < n && n == served:
		return Refused, ""
	case w == complained && n == complained:
		return Undecided, "the request was not understood either way, so that the header made no difference"
	default:
		return Undecided, "the port does not speak the protocol of the check, or its server is ill"
	}
}

// judgeTCP only knows whether the server spoke and whether it stayed. Words on
// one connection alone prove nothing: a receiver that requires the header lets a
// server's greeting pass after it, and a plain server answers the header with an
// error.
func judgeTCP(with, without answer) (Kind, string) {
	switch {
	case !with.ended && without.ended && with.lasted >= without.lasted:
		return Required, ""
	case with.ended && !without.ended && without.lasted >= with.lasted:
		return Refused, ""
	case with.ended && without.ended && len(with.data) == 0 && len(without.data) > 0:
		return Refused, ""
	case with.spoke() && without.spoke():
		return Undecided, "the server speaks first, and has not said what it thinks of the header"
	case with.ended && without.ended:
		return Undecided, "the server ends every connection"
	case with.spoke():
		return Undecided, "either a greeting behind a receiver that requires the header, or the complaint of a server that does not know it"
	default:
		return Undecided, "the port waits for its client to speak; the check HTTP or HTTPS tells more where it applies"
	}
}
