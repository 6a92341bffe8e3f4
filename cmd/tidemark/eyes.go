package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// What is printed for people: colours where a terminal shows them, times as they are
// said, digests as short as they can be told apart.

// colourful tells whether colours are shown: on a terminal, unless NO_COLOR
// (no-color.org) or the terminal says otherwise.
func colourful(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isTerminal(f) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// colourOf is how a terminal shows a severity (ECMA-48, SGR).
var colourOf = map[audit.Severity]string{audit.Critical: "1;31", audit.High: "31", audit.Warning: "33", audit.Notice: "36", audit.Info: "2"}

// paint is a text in the colour of a severity.
func paint(on bool, s audit.Severity, text string) string {
	if !on {
		return text
	}
	return "\x1b[" + colourOf[s] + "m" + text + "\x1b[0m"
}

const (
	shortLeast = 12 // characters of a digest that are shown
	shortMore  = 4  // at a time, until no two are the same
)

// A shortener makes digests as short as they can be told apart, among all that it was
// shown so far.
type shortener struct {
	n    int // characters
	seen map[string]digest.Digest
}

// see has digests told apart from the others.
func (s *shortener) see(digests ...digest.Digest) {
	if s.seen == nil {
		s.seen = make(map[string]digest.Digest)
	}
	for _, d := range digests {
		if d.Validate() != nil {
			continue
		}
		for s.taken(d) {
			s.lengthen()
		}
		s.seen[s.hex(d)] = d
	}
}

// taken tells that another digest is shown as d would be.
func (s *shortener) taken(d digest.Digest) bool {
	other, ok := s.seen[s.hex(d)]
	return ok && other != d
}

// lengthen shows more of each.
func (s *shortener) lengthen() {
	s.n = max(s.n, shortLeast) + shortMore
	before := s.seen
	s.seen = make(map[string]digest.Digest, len(before))
	for _, d := range before {
		s.seen[s.hex(d)] = d
	}
}

// short is a digest with its algorithm, hex is it without.
func (s *shortener) short(d digest.Digest) string {
	if d.Validate() != nil {
		return orNothing(string(d))
	}
	return d.Algorithm().String() + ":" + s.hex(d)
}

func (s *shortener) hex(d digest.Digest) string {
	if d.Validate() != nil {
		return orNothing(string(d))
	}
	return d.Encoded()[:min(max(s.n, shortLeast), len(d.Encoded()))]
}

// line is an event in one line, as log --follow has it.
func (s *shortener) line(index int64, e audit.Event) string {
	s.see(digestsOf(e)...)
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %-8s  %-6d  %s", e.Time.Local().Format(time.DateTime), e.Severity(), index, e.Type)
	if e.Ref != (audit.Ref{}) {
		fmt.Fprintf(&b, "  %s", e.Ref)
	}
	switch {
	case e.Old != nil && e.New != nil && e.Old.Digest != e.New.Digest:
		fmt.Fprintf(&b, "  %s -> %s", s.hex(e.Old.Digest), s.hex(e.New.Digest))
	case e.New != nil:
		fmt.Fprintf(&b, "  %s", s.hex(e.New.Digest))
	}
	if e.Class != "" {
		fmt.Fprintf(&b, "  %s", e.Class)
	}
	if op := e.Operator; op != nil {
		fmt.Fprintf(&b, "  %s", strings.TrimSpace(op.Action+" "+op.Target))
	}
	if len(e.Signals) > 0 {
		fmt.Fprintf(&b, "  %s", strings.Join(e.Signals, " "))
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, "  (%s)", e.Reason)
	}
	if e.Policy.Effect == "serving-old" && e.Policy.Served != "" {
		s.see(e.Policy.Served)
		fmt.Fprintf(&b, "  serves %s", s.hex(e.Policy.Served))
	}
	return printable(b.String())
}

func digestsOf(e audit.Event) (out []digest.Digest) {
	for _, c := range []*audit.Content{e.Old, e.New} {
		if c != nil {
			out = append(out, c.Digest)
		}
	}
	return out
}
