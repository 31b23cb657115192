package main

import (
	"regexp"
	"strings"
	"unicode"
)

// maxWords bounds a text that comes from elsewhere, in runes.
const maxWords = 400

// keys are Tailscale's and Headscale's keys in any text; a signed one has base64
// at its end (ipn/ipnlocal/tailnet-lock.go).
var keys = regexp.MustCompile(`[th]skey-[A-Za-z]+-[A-Za-z0-9_+/=-]+`)

// harmless makes a text that somebody else wrote fit for one line of a log, or for a
// terminal: in one line, without control characters and characters that change the
// direction of writing, not too long, and without our secrets.
func (n *node) harmless(text string) string {
	text = n.redact(text)
	count := 0
	return strings.Map(func(r rune) rune {
		count++
		switch {
		case count > maxWords:
			return -1
		case count == maxWords:
			return '…'
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r):
			return '·'
		}
		return r
	}, text)
}

// redact removes keys, and the node's other credentials, from a text.
func (n *node) redact(text string) string {
	c := n.credential()
	for _, secret := range []string{c.authKey, c.clientSecret, c.idToken} {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "[not shown]")
		}
	}
	if strings.Contains(text, "skey-") {
		text = keys.ReplaceAllString(text, "[not shown]")
	}
	return text
}
