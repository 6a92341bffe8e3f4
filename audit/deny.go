package audit

import (
	"errors"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Digests that are never to be served, whatever the rules say.

// denied is why a digest of PolicyText.Denied is held.
const denied = "denied"

// ErrDeniedDigest reports that all there is to serve is denied by its digest.
var ErrDeniedDigest = errors.New("audit.denied has the digest that this tag means, and it meant no other one before that is here")

// Denied are the digests that are never to be served.
func (p *Policy) Denied() []digest.Digest {
	if p == nil {
		return nil
	}
	return p.text.Denied
}

// Denies tells whether a digest is never to be served.
func (p *Policy) Denies(d digest.Digest) bool { return slices.Contains(p.Denied(), d) }

// expel sees to it that nothing denied is served, whatever was decided before: what the
// ref meant before is served again, if that is known, and nothing otherwise.
func (t *turn) expel() {
	for _, c := range t.s.Candidates {
		if t.p.Denies(c.Digest) && !c.Rejected {
			c.Rejected, c.Escalated = true, denied
			t.s.setCandidate(c)
		}
	}
	if t.s.Served == "" || !t.p.Denies(t.s.Served) {
		return
	}
	bad := Candidate{
		Digest: t.s.Served, MediaType: t.s.ServedMediaType, Size: t.s.ServedSize, Since: t.s.HeadSince,
		Left: t.s.Served != t.s.Head, Served: true, Rejected: true, Escalated: denied,
	}
	waiting := slices.DeleteFunc(slices.Clone(t.s.Candidates), func(c Candidate) bool { return c.Digest == bad.Digest })
	t.s.Candidates = append([]Candidate{bad}, waiting...)
	t.s.Served, t.s.ServedMediaType, t.s.ServedSize = "", "", 0
	if t.r.Former != nil {
		if c, ok := t.r.Former(func(d digest.Digest) bool {
			return d == bad.Digest || d == t.s.Head || t.p.Denies(d) || slices.ContainsFunc(waiting, func(w Candidate) bool { return w.Digest == d })
		}); ok {
			t.s.Served, t.s.ServedMediaType, t.s.ServedSize = c.Digest, c.MediaType, c.Size
		}
	}
	t.lag()
	effect := Effect{Effect: servingOld}
	if t.s.Served == "" {
		effect.Effect = refusing
	}
	t.event(Event{Type: Violation, Old: t.s.served(), New: &Content{Digest: bad.Digest, MediaType: bad.MediaType, Size: bad.Size}, Reason: denied, Policy: effect})
}
