package audit

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// An Entry is an event in its place in the log, with the bytes that are hashed.
type Entry struct {
	Index int64
	Leaf  []byte
}

// A Tag is a ref, what is recorded of it, and the rule that decides about it.
type Tag struct {
	Ref   Ref
	State State
	Rule  *Rule

	denied bool // what is served is, by its digest
}

// Withheld is what Answer.Withheld tells.
func (t Tag) Withheld() (head digest.Digest, until *time.Time, why string) {
	return withheld(t.State, t.Rule)
}

// Serves is the digest that clients get, "" if a rule refuses them.
func (t Tag) Serves() digest.Digest {
	if t.denied || refusal(t.State, t.Rule) != nil {
		return ""
	}
	return t.State.Served
}

// A Stint is a time in which a ref meant one digest.
type Stint struct {
	Digest        digest.Digest
	MediaType     string
	Size          int64
	NotBefore     *time.Time // the last answer that confirmed the digest before
	FirstSeen     time.Time
	LastConfirmed time.Time
	Ended         *time.Time    // when another was seen, or none
	EndReason     string        // the type of the event that ended it
	Index         int64         // of the event that began it
	Basis         string        // Observed or Imported
	Diff          digest.Digest // from the one before, "" without one
}

// A HistoryQuery selects stints of a ref, newest first. The zero value selects all.
type HistoryQuery struct {
	Before     *int64    // those that began with an event before this index
	SeenBefore time.Time // those first seen before this time; zero is no bound
	Limit      int       // 0 is no limit
}

// A Kept digest is one whose bytes are to be kept: firmly, because it is promised,
// or as history, while there is room.
type Kept struct {
	Digest    digest.Digest
	Firm      bool
	Platforms []string // of an index, those whose images are kept; nil for all
	Reason    string   // one of those below
	For       string   // the ref or the pin that it is kept for, "" for the log itself
	Note      string   // of a pin, what the operator says why
}

// Why content is kept.
const (
	KeptPin     = "pin"     // an operator wants it
	KeptHold    = "hold"    // it is served although upstream may have forgotten it
	KeptBundle  = "bundle"  // it was carried here
	KeptHistory = "history" // a ref meant it lately
)

// A TagQuery selects tags in order of their refs. The zero value selects all.
type TagQuery struct {
	Match      Glob
	Held       *bool     // only those of which something is held back, or only others
	Kept       bool      // only those whose served bytes are promised: State.Kept
	MovedSince time.Time // the head is what it is since this time or later, and was another before
	After      Ref       // refs that follow this one
	Limit      int       // 0 is no limit
}

// An EventQuery selects entries of the log. The zero value selects all, oldest
// first.
type EventQuery struct {
	Ref          *Ref
	Type         Type      // "" is every type
	Since, Until time.Time // inclusive, exclusive; zero is no bound
	After        *int64    // entries beyond this index, in the direction of the query
	Descending   bool
	Limit        int // 0 is no limit
}

// A Glob matches refs as they are written: ? is one character and * any number
// of them within a component, ** any number of anything. The zero Glob matches
// all.
type Glob struct {
	pattern string
	re      *regexp.Regexp
}

// ParseGlob compiles a pattern such as docker.io/library/*:latest.
func ParseGlob(pattern string) (Glob, error) {
	if pattern == "" || strings.ContainsAny(pattern, " \t\n[]{}\\") {
		return Glob{}, fmt.Errorf("pattern %q: want a ref in which ?, * and ** stand for others", pattern)
	}
	var b strings.Builder
	b.WriteString("^")
	for rest := pattern; rest != ""; {
		switch {
		case strings.HasPrefix(rest, "**"):
			b.WriteString(".*")
			rest = rest[2:]
			continue
		case rest[0] == '*':
			b.WriteString("[^/:]*")
		case rest[0] == '?':
			b.WriteString("[^/:]")
		default:
			b.WriteString(regexp.QuoteMeta(rest[:1]))
		}
		rest = rest[1:]
	}
	b.WriteString("$")
	re, err := regexp.Compile(b.String())
	if err != nil {
		return Glob{}, fmt.Errorf("pattern %q: %w", pattern, err)
	}
	return Glob{pattern, re}, nil
}

// Possible tells whether the pattern can stand for a whole ref at all: one has an
// upstream, a repository and a tag.
func (g Glob) Possible() bool {
	if strings.Contains(g.pattern, "**") {
		return true
	}
	repository, _, tagged := strings.Cut(g.pattern, ":")
	return tagged && strings.Contains(repository, "/")
}

// String is the pattern as it was written.
func (g Glob) String() string { return g.pattern }

// Prefix is what every ref that the pattern stands for begins with.
func (g Glob) Prefix() string {
	if i := strings.IndexAny(g.pattern, "*?"); i >= 0 {
		return g.pattern[:i]
	}
	return g.pattern
}

// Matches tells whether the pattern stands for ref.
func (g Glob) Matches(ref Ref) bool { return g.re == nil || g.re.MatchString(ref.String()) }
