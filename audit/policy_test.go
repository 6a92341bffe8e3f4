package audit_test

import (
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

var noon = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

// A story is one ref as a store would keep it, without a store.
type story struct {
	policy *audit.Policy
	ref    audit.Ref
	state  audit.State
	past   map[digest.Digest]audit.Past
	last   time.Time
	events []audit.Event
}

func newStory(p *audit.Policy) *story {
	return &story{policy: p, ref: audittest.Ref("1"), past: make(map[digest.Digest]audit.Past)}
}

func (s *story) record() audit.Record {
	return audit.Record{State: s.state, Last: s.last, Past: func(d digest.Digest) (audit.Past, bool) {
		p, was := s.past[d]
		return p, was
	}}
}

// take commits what a decision came to.
func (s *story) take(st audit.State, events []audit.Event) []audit.Event {
	audit.Identify(&st, events)
	for _, e := range events {
		s.last = e.Time
		switch {
		case e.Type.Moves() && e.Old != nil:
			p := s.past[e.Old.Digest]
			p.Left = e.ID
			if p.FirstSeen.IsZero() {
				p.FirstSeen = *e.Old.FirstSeen
			}
			s.past[e.Old.Digest] = p
		case e.Type == audit.Withdrawn:
			p := s.past[e.New.Digest]
			p.Withdrawn = e.Reason
			s.past[e.New.Digest] = p
		case e.Type == audit.Rejected:
			p := s.past[e.New.Digest]
			p.Rejected = true
			s.past[e.New.Digest] = p
		case e.Type == audit.Released && e.Operator != nil:
			p := s.past[e.New.Digest]
			p.Withdrawn, p.Rejected = "", false
			s.past[e.New.Digest] = p
		}
	}
	s.state = st
	s.events = append(s.events, events...)
	return events
}

// see has upstream answer, and records what follows.
func (s *story) see(name string, now time.Time) []audit.Event {
	return s.observe(audit.Observation{Digest: audittest.Digest(name)}, now)
}

func (s *story) observe(seen audit.Observation, now time.Time) []audit.Event {
	return s.take(s.policy.Next(s.ref, s.record(), seen, now))
}

// Under observe what upstream says is served at once, and each change is one
// event of the most specific type.
func TestObserve(t *testing.T) {
	type answer struct {
		hour    int        // when upstream is asked,
		seen    string     // what it says, which clients then get,
		becomes audit.Type // and what the log then says, or nothing
	}
	for _, tt := range []struct {
		name    string
		answers []answer
	}{
		{"a tag that stays", []answer{{0, "a", audit.FirstSeen}, {1, "a", ""}, {100, "a", ""}}},
		{"a tag that moves", []answer{{0, "a", audit.FirstSeen}, {1, "b", audit.Moved}, {2, "b", ""}, {3, "c", audit.Moved}}},
		{"a move that is taken back", []answer{{0, "a", audit.FirstSeen}, {1, "b", audit.Moved}, {2, "a", audit.Reverted}, {3, "c", audit.Moved}, {4, "b", audit.Reverted}}},
		{"a clock that is set back", []answer{{5, "a", audit.FirstSeen}, {1, "b", audit.Moved}, {3, "b", ""}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newStory(nil)
			for _, a := range tt.answers {
				events := p.see(a.seen, noon.Add(time.Duration(a.hour)*time.Hour))
				var got audit.Type
				if len(events) > 0 {
					got = events[0].Type
				}
				if len(events) > 1 || got != a.becomes {
					t.Errorf("hour %d: %q became %v, want %q", a.hour, a.seen, events, a.becomes)
				}
				if p.state.Served != audittest.Digest(a.seen) {
					t.Errorf("hour %d: %s is served, want %q", a.hour, p.state.Served, a.seen)
				}
			}
		})
	}
}

// The interval of a move begins with the last answer that confirmed the old
// digest and ends with the first that told the new one.
func TestIntervalIsHonest(t *testing.T) {
	p := newStory(nil)
	p.see("a", noon)
	p.see("a", noon.Add(time.Hour))
	e := p.see("b", noon.Add(3*time.Hour))[0]
	if !e.Interval.NotBefore.Equal(noon.Add(time.Hour)) || !e.Interval.NotAfter.Equal(noon.Add(3*time.Hour)) {
		t.Errorf("interval is %v to %v", e.Interval.NotBefore, e.Interval.NotAfter)
	}
	if !e.Old.FirstSeen.Equal(noon) {
		t.Errorf("old digest was first seen %v, want %v", e.Old.FirstSeen, noon)
	}
}

// A leaf is read back as it was written, and stays readable when a later
// version adds fields to it.
func TestLeafIsReadBack(t *testing.T) {
	p := newStory(nil)
	p.see("a", noon)
	p.see("b", noon.Add(time.Hour))
	p.see("a", noon.Add(2*time.Hour))
	for _, e := range p.events {
		leaf, err := e.Leaf()
		if err != nil {
			t.Fatal(err)
		}
		got, err := audit.ParseLeaf(append([]byte(`{"later":1,`), leaf[1:]...))
		if err != nil {
			t.Fatal(err)
		}
		again, err := got.Leaf()
		if err != nil || string(again) != string(leaf) {
			t.Errorf("read back as %s, want %s; %v", again, leaf, err)
		}
	}
}

// The leaf's format is for ever: a change of these bytes is a new version.
func TestLeafFormat(t *testing.T) {
	p := newStory(nil)
	p.see("a", noon)
	e := p.observe(audit.Observation{
		Digest: audittest.Digest("b"), MediaType: "application/vnd.oci.image.index.v1+json", Size: 1609,
		Evidence: audit.Evidence{Via: []string{"HEAD", "GET"}, BodyVerified: true, AcceptProfile: "canonical-1", Identity: "anonymous", Trigger: "pull"},
	}, noon.Add(time.Hour))[0]
	e.ID = uuid.MustParse("01993d0e-6c1b-7f52-9a55-0d3c1f0a7a10")
	leaf, err := e.Leaf()
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"v":1,"id":"01993d0e-6c1b-7f52-9a55-0d3c1f0a7a10","type":"tag.moved","time":"2026-07-01T13:00:00Z",` +
		`"ref":{"upstream":"docker.io","repository":"library/app","tag":"1"},` +
		`"old":{"digest":"sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb","first_seen":"2026-07-01T12:00:00Z"},` +
		`"new":{"digest":"sha256:3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d","mediaType":"application/vnd.oci.image.index.v1+json","size":1609},` +
		`"interval":{"not_before":"2026-07-01T12:00:00Z","not_after":"2026-07-01T13:00:00Z"},` +
		`"evidence":{"via":["HEAD","GET"],"body_sha256_verified":true,"accept_profile":"canonical-1","identity":"anonymous","trigger":"pull"},` +
		`"class":"unknown","policy":{"mode":"observe","effect":"serving-new","served":"sha256:3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"}}`
	if string(leaf) != want {
		t.Errorf("leaf is\n%s\nwant\n%s", leaf, want)
	}
}
