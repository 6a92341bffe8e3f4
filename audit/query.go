package audit

import (
	"fmt"
	"regexp"
	"strings"
	"time"
)

// An Entry is an event in its place in the log, with the bytes that are hashed.
type Entry struct {
	Index int64
	Leaf  []byte
}

// A Tag is a ref and what is recorded of it.
type Tag struct {
	Ref   Ref
	State State
}

// A TagQuery selects tags in order of their refs. The zero value selects all.
type TagQuery struct {
	Match      Glob
	MovedSince time.Time // the head is what it is since this time or later
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
type Glob struct{ re *regexp.Regexp }

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
	return Glob{re}, nil
}

// Matches tells whether the pattern stands for ref.
func (g Glob) Matches(ref Ref) bool { return g.re == nil || g.re.MatchString(ref.String()) }
