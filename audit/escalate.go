package audit

import (
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// What of a move raises a rule for it, and what lowers it (AUDIT.md, A9.1).

// escalations are what can raise a rule for a digest: it is held until somebody
// approves it, whatever the mode. Each has the signals that it is known by.
var escalations = map[string][]string{
	string(Downgraded): {signatureLost, provenanceLost}, string(TrustChanged): {signerChanged}, string(Burst): {"burst"}, string(Aliased): {"alias"},
	"user_to_root": {"user_to_root", NotCompared}, "entrypoint_changed": {"entrypoint_changed", NotCompared}, "platform_removed": {"platform_removed"},
}

// Escalates tells whether a reason for which something is held is that a rule was raised.
func Escalates(reason string) bool { return escalations[reason] != nil }

// bypasses are the classes that can lower a rule for a digest: it is served although it
// is new. What they are compared with must have been served.
var bypasses = []string{string(ClassRepackaged), string(ClassAttestationOnly), string(ClassBaseRefresh)}

// allows tells whether a digest need not wait.
func (p *Policy) allows(d digest.Digest) bool { return p != nil && slices.Contains(p.text.Allowed, d) }

// barred tells that no rule serves the candidate by itself.
func (c Candidate) barred() bool { return c.Rejected || c.Escalated != "" }

// missed tells that the candidate is held because something is missed beside it.
func (c Candidate) missed() bool {
	return c.Escalated == string(Downgraded) || c.Escalated == string(TrustChanged)
}

// weigh raises or lowers the rule for the new head by how it differs from what is served.
// What went wrong with the head before it does not make it any better: without knowing
// how the new one differs from what is served, it is held as that was.
func (t *turn) weigh(e *Event) {
	c, ok := t.s.candidate(t.s.Head)
	if !ok || e.Type == FirstSeen {
		return
	}
	signals, class := e.Signals, e.Class
	if e.Old != nil && e.Old.Digest != t.s.Served {
		was, _ := t.s.candidate(e.Old.Digest)
		cmp := t.fromServed()
		if (cmp == nil || cmp.Trust == nil && was.missed()) && was.Escalated != denied && c.Escalated == "" {
			c.Escalated = was.Escalated
		}
		class = ClassUnknown
		if cmp != nil {
			class = classify(cmp, false)
			signals = slices.Clone(cmp.Signals)
			if cmp.Trust != nil {
				signals = append(signals, cmp.Trust.lost()...)
			}
			for _, s := range e.Signals {
				if name := before(s, ":"); name == "burst" || name == "alias" {
					signals = append(signals, s)
				}
			}
		}
	}
	if slices.Contains(t.rule.Bypass, string(class)) {
		c.Bypass = string(class)
	}
	if cmp := t.fromServed(); cmp != nil && cmp.Trust != nil && len(cmp.Trust.lost()) == 0 && c.missed() {
		c.Escalated = "" // it came since
	}
	if past, was := t.past(c.Digest); !was || e.Type != Reverted || past.Withdrawn != "" || past.Rejected || past.Escalated != "" {
		// To go back to what nothing was wrong with is what a publisher does about the rest.
		for _, name := range t.rule.Escalate {
			c.raise(name, signals)
		}
	}
	t.s.setCandidate(c)
}

// fromServed is how the new head differs from what is served, nil if that is not known.
func (t *turn) fromServed() *Comparison {
	for _, c := range []*Comparison{t.seen.Served, t.seen.Change} {
		if c != nil && c.Old == t.s.Served && c.New == t.s.Head {
			return c
		}
	}
	return nil
}

// raise has the candidate held by an escalation, if one of the signals is its. What is only
// missed beside it may come: any other reason counts more.
func (c *Candidate) raise(name string, signals []string) {
	if c.Escalated != "" && !c.missed() || name == "platform_removed" && slices.Contains(signals, Unconsumed) {
		return
	}
	if slices.ContainsFunc(signals, func(s string) bool { return slices.Contains(escalations[name], before(s, ":")) }) {
		other := Candidate{Escalated: name}
		if c.Escalated == "" || !other.missed() {
			c.Escalated = name
		}
	}
}

// allowed is why a digest of PolicyText.Allowed need not wait.
const allowed = "allowed"

// allow has the policy's list of digests that need not wait decide about the head, on it
// or no longer.
func (t *turn) allow() {
	c, ok := t.s.candidate(t.s.Head)
	if !ok || t.p.allows(c.Digest) == (c.Bypass == allowed) {
		return
	}
	c.Bypass = ""
	if t.p.allows(c.Digest) {
		c.Bypass, c.Escalated = allowed, ""
	}
	t.s.setCandidate(c)
}

func before(s, sep string) string {
	s, _, _ = strings.Cut(s, sep)
	return s
}

// found takes back that a head was held because something was missed beside it.
func (t *turn) found() {
	if c, ok := t.s.candidate(t.s.Head); ok && c.missed() {
		c.Escalated = ""
		t.s.setCandidate(c)
	}
}

// bursting raises the rule for a candidate that was among the first of a burst: when it
// moved nobody knew of it yet. It tells whether it did.
func (t *turn) bursting(c Candidate) bool {
	if t.r.Burst == nil || !slices.Contains(t.rule.Escalate, string(Burst)) || !t.r.Burst(c.Since.Add(-BurstWindow), c.Since.Add(BurstWindow)) {
		return false
	}
	c.Escalated = string(Burst)
	t.s.setCandidate(c)
	t.event(Event{Type: Held, Old: t.s.served(), New: &Content{Digest: c.Digest, MediaType: c.MediaType, Size: c.Size, FirstSeen: &c.Since}, Reason: c.Escalated, Policy: Effect{Effect: servingOld}})
	return true
}
