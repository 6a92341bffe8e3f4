package audit_test

import (
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

var noon = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

// A past is a history as a store would tell it.
type past struct {
	state  audit.State
	left   map[digest.Digest]uuid.UUID
	events []audit.Event
}

// see has upstream answer, and records what follows.
func (p *past) see(name string, now time.Time) []audit.Event {
	d := audittest.Digest(name)
	st, events := audit.Policy{}.Next(audittest.Ref("1"), p.state, func(d digest.Digest) (uuid.UUID, bool) {
		id, was := p.left[d]
		return id, was
	}, audit.Observation{Digest: d}, now)
	for i := range events {
		events[i].ID = uuid.Must(uuid.NewV7())
		if events[i].Old != nil {
			p.left[events[i].Old.Digest] = events[i].ID
		}
	}
	p.state = st
	p.events = append(p.events, events...)
	return events
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
			p := &past{left: make(map[digest.Digest]uuid.UUID)}
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
	p := &past{left: make(map[digest.Digest]uuid.UUID)}
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

// Whatever upstream answers and the clock does: each event of a ref begins with
// the digest at which the one before ended, and their intervals do not overlap.
func TestAnyAnswersLeaveAChain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := &past{left: make(map[digest.Digest]uuid.UUID)}
		now := noon
		for range rapid.IntRange(1, 40).Draw(t, "answers") {
			now = now.Add(time.Duration(rapid.Int64Range(-5000, 100_000).Draw(t, "ms")) * time.Millisecond)
			seen := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "seen")
			p.see(seen, now)
			if p.state.Head != audittest.Digest(seen) || p.state.Served != p.state.Head {
				t.Fatalf("upstream says %q, head is %s and %s is served", seen, p.state.Head, p.state.Served)
			}
		}
		for i, e := range p.events {
			if i == 0 {
				if e.Type != audit.FirstSeen || e.Old != nil {
					t.Fatalf("the first event is %+v", e)
				}
				continue
			}
			before := p.events[i-1]
			if e.Old.Digest != before.New.Digest {
				t.Fatalf("event %d begins with another digest", i)
			}
			if e.Interval.NotBefore.Before(before.Interval.NotAfter) || e.Interval.NotAfter.Before(*e.Interval.NotBefore) {
				t.Fatalf("event %d overlaps the one before", i)
			}
		}
	})
}

// A leaf is read back as it was written, and stays readable when a later
// version adds fields to it.
func TestLeafIsReadBack(t *testing.T) {
	p := &past{left: make(map[digest.Digest]uuid.UUID)}
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
	p := &past{left: make(map[digest.Digest]uuid.UUID)}
	p.see("a", noon)
	e := p.see("b", noon.Add(time.Hour))[0]
	e.ID = uuid.MustParse("01993d0e-6c1b-7f52-9a55-0d3c1f0a7a10")
	leaf, err := e.Leaf()
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"v":1,"id":"01993d0e-6c1b-7f52-9a55-0d3c1f0a7a10","type":"tag.moved","time":"2026-07-01T13:00:00Z",` +
		`"ref":{"upstream":"docker.io","repository":"library/app","tag":"1"},` +
		`"old":{"digest":"sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb","first_seen":"2026-07-01T12:00:00Z"},` +
		`"new":{"digest":"sha256:3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"},` +
		`"interval":{"not_before":"2026-07-01T12:00:00Z","not_after":"2026-07-01T13:00:00Z"},` +
		`"evidence":{"via":null,"body_sha256_verified":false,"accept_profile":"","trigger":""},` +
		`"policy":{"mode":"observe","effect":"serving-new","served":"sha256:3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"}}`
	if string(leaf) != want {
		t.Errorf("leaf is\n%s\nwant\n%s", leaf, want)
	}
}
