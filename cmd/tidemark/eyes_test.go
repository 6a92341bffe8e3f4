package main

import (
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// Digests are shortened as far as they can be told apart, and no further.
func TestShortDigestsStayUnambiguous(t *testing.T) {
	hex := func(s string) digest.Digest { return digest.Digest("sha256:" + s + strings.Repeat("0", 64-len(s))) }
	a, b, c := hex("0123456789abcdef"), hex("0123456789abcdee"), hex("fedcba9876543210")
	var s shortener
	if got := s.hex(a); got != "0123456789ab" {
		t.Errorf("alone: %s", got)
	}
	s.see(a, c, a)
	if got := s.hex(a); got != "0123456789ab" {
		t.Errorf("beside another: %s", got)
	}
	s.see(b)
	if s.hex(a) != "0123456789abcdef" || s.hex(b) != "0123456789abcdee" || s.hex(c) != "fedcba9876543210" {
		t.Errorf("beside one like it: %s, %s, %s", s.hex(a), s.hex(b), s.hex(c))
	}
	if got := s.short(a); got != "sha256:0123456789abcdef" {
		t.Errorf("with its algorithm: %q", got)
	}
	if got := s.short(""); got != "nothing" {
		t.Errorf("none: %q", got)
	}
}

// An event is one line whose colour is its severity, and no text of others moves the
// cursor.
func TestEventsAreLines(t *testing.T) {
	e := audit.Event{
		Type: audit.Violation, Time: time.Date(2026, 7, 1, 12, 0, 0, 0, time.Local), Ref: audit.Ref{Upstream: "docker.io", Repository: "library/app", Tag: "1"},
		Old: &audit.Content{Digest: digest.FromString("a")}, New: &audit.Content{Digest: digest.FromString("b")},
		Class: audit.ClassUnknown, Signals: []string{"entrypoint_changed", "burst:3"}, Reason: "immutable",
		Policy: audit.Effect{Effect: "serving-old", Served: digest.FromString("a")},
	}
	want := "2026-07-01 12:00:00  critical  7       policy.violation  docker.io/library/app:1  ca978112ca1b -> 3e23e8160039  unknown  entrypoint_changed burst:3  (immutable)  serves ca978112ca1b"
	if got := (&shortener{}).line(7, e); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := paint(true, e.Severity(), "x"); got != "\x1b[1;31mx\x1b[0m" {
		t.Errorf("%q", got)
	}
	if got := paint(false, e.Severity(), "x"); got != "x" {
		t.Errorf("%q", got)
	}
	e.Reason = "\x1b[2Jgone"
	if got := (&shortener{}).line(7, e); strings.ContainsRune(got, 0x1b) {
		t.Errorf("%q moves the cursor", got)
	}
}
