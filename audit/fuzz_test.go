package audit_test

import (
	"strings"
	"testing"

	"tidemark/audit"
)

// A pattern that is accepted stands only for refs that begin with its prefix, and
// for itself if it has no wildcards.
func FuzzParseGlob(f *testing.F) {
	for _, p := range []string{"docker.io/library/*:latest", "**", "ghcr.io/acme/**", "docker.io/library/nginx:1.27", "*/?:*", "a/b:c**", "[", "a b", ""} {
		f.Add(p, "docker.io/library/nginx:1.27")
	}
	f.Fuzz(func(t *testing.T, pattern, text string) {
		g, err := audit.ParseGlob(pattern)
		if err != nil {
			return
		}
		ref, err := audit.ParseRef(text)
		if err != nil {
			return
		}
		if ref.String() != text {
			t.Fatalf("%q is read as %q", text, ref)
		}
		if g.Matches(ref) && !strings.HasPrefix(text, g.Prefix()) {
			t.Fatalf("%q stands for %q, which does not begin with %q", pattern, text, g.Prefix())
		}
		if !strings.ContainsAny(pattern, "*?") && g.Matches(ref) != (pattern == text) {
			t.Fatalf("%q stands for %q: %t", pattern, text, g.Matches(ref))
		}
	})
}

// A leaf of anybody's is read or refused, and what is read can be written.
func FuzzParseLeaf(f *testing.F) {
	p := newStory(nil)
	p.see("a", noon)
	for _, e := range p.see("b", noon.Add(hour)) {
		leaf, err := e.Leaf()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(leaf)
	}
	f.Add([]byte(`{"v":1,"type":"audit.gap","gap":{},"policy":{"until":"x"}}`))
	f.Fuzz(func(t *testing.T, leaf []byte) {
		e, err := audit.ParseLeaf(leaf)
		if err != nil {
			return
		}
		if _, err := e.Leaf(); err != nil && !strings.Contains(err.Error(), "year outside") && !strings.Contains(err.Error(), "more than a leaf") {
			t.Fatal(err)
		}
	})
}
