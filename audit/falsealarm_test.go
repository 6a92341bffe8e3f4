package audit_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// The rules R1 to R17 of AUDIT.md, A12, as far as they are about decisions. R1,
// R2 and R12 are about how upstream is asked: package proxy has them. R8 to R10
// are about manifests: package audit/diff has their other half.

func at(minutes float64) time.Time { return noon.Add(time.Duration(minutes * float64(time.Minute))) }

func seen(name string) audit.Observation {
	return audit.Observation{Digest: audittest.Digest(name), Evidence: audit.Evidence{AcceptProfile: "canonical-1", Identity: "anonymous"}}
}

func from(edge, name string) audit.Observation {
	o := seen(name)
	o.Evidence.Edge = edge
	return o
}

var absent = audit.Observation{Absent: errors.New("404 Not Found")}

func gone() audit.Observation {
	o := absent
	o.Gone = true
	return o
}

// R3: under observe a new digest is served at once and on the record at once, but
// it is settled, and worth telling people, only when an answer half a minute later
// says it too.
func TestR3MoveIsSettledByASecondAnswer(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	s.observe(seen("a"), at(0))
	if !s.state.Settled() {
		t.Error("a first sighting is a baseline: nobody has to be told")
	}
	s.observe(seen("b"), at(10))
	if s.state.Served != audittest.Digest("b") || s.state.Settled() {
		t.Errorf("at once %s is served, settled %t; want b, unsettled", s.state.Served, s.state.Settled())
	}
	s.observe(seen("b"), at(10.4))
	if s.state.Settled() {
		t.Error("settled by an answer 24 seconds later, want 30")
	}
	s.observe(seen("b"), at(10.6))
	if !s.state.Settled() {
		t.Error("not settled by an answer 36 seconds later")
	}
}

// R4: there and back within the window is on the record each time, but when it
// goes on it is a flap: told once when it begins and once when it has been calm
// for an hour, with counts; a cooldown promotes nothing meanwhile.
func TestR4Flapping(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Cooldown, Age: 20 * time.Minute, Tenure: tenure(0)}))
	for i, want := range []string{"first_seen", "moved held", "reverted", "reverted flapping held", "reverted", "reverted held"} {
		if got := short(s.observe(seen([]string{"a", "b"}[i%2]), at(float64(4*i)))); got != want {
			t.Errorf("answer %d: %q, want %q", i, got, want)
		}
	}
	if got := short(s.observe(seen("b"), at(20+45))); got != "" || s.state.Served != audittest.Digest("a") {
		t.Errorf("old enough, but flapping: %q, %s is served", got, s.state.Served)
	}
	if got := short(s.observe(seen("b"), at(20+61))); got != "flapping released" || s.state.Served != audittest.Digest("b") {
		t.Errorf("calm for an hour: %q, %s is served", got, s.state.Served)
	}
	open, closed := s.events[slices.IndexFunc(s.events, isFlap)].Flap, s.events[len(s.events)-2].Flap
	if open.State != "open" || open.Changes != 3 || len(open.Digests) != 2 || closed.State != "closed" || closed.Changes != 5 {
		t.Errorf("told as %+v and %+v", open, closed)
	}
	slow := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	for i := range 8 {
		slow.observe(seen([]string{"a", "b"}[i%2]), at(float64(20*i)))
	}
	three := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	for i := range 8 {
		three.observe(seen(fmt.Sprint(i)), at(float64(i)))
	}
	if slices.ContainsFunc(slow.events, isFlap) || slices.ContainsFunc(three.events, isFlap) {
		t.Error("slow changes, or changes among many digests, were told as flapping")
	}
}

func isFlap(e audit.Event) bool { return e.Type == audit.Flapping }

// R5: what happened between two answers is not made up: the move is from the last
// digest that was seen to the next one, in an honest interval.
func TestR5OneGapOneMove(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	s.observe(seen("a"), at(0))
	s.observe(seen("a"), at(5))
	e := s.observe(seen("c"), at(60))[0]
	if e.Old.Digest != audittest.Digest("a") || !e.Interval.NotBefore.Equal(at(5)) || !e.Interval.NotAfter.Equal(at(60)) {
		t.Errorf("the move is from %s between %v and %v", e.Old.Digest, e.Interval.NotBefore, e.Interval.NotAfter)
	}
}

// R6: a tag is deleted only after enough answers over enough time, and another
// sign of it; then on_deleted decides.
func TestR6DeletionNeedsMoreThanOneSign(t *testing.T) {
	p := compile(t, audit.RuleText{Mode: audit.Observe, OnDeleted: audit.DeletedRefuse})
	type answer struct {
		minute float64
		o      audit.Observation
		events string
	}
	for name, answers := range map[string][]answer{
		"too few":                    {{1, absent, ""}, {70, gone(), ""}},
		"too soon":                   {{1, absent, ""}, {2, absent, ""}, {3, gone(), ""}, {30, gone(), ""}},
		"the list still has it":      {{1, absent, ""}, {30, absent, ""}, {62, absent, ""}, {200, absent, ""}},
		"an answer in between":       {{1, absent, ""}, {30, absent, ""}, {40, seen("a"), ""}, {62, gone(), ""}, {70, gone(), ""}},
		"enough":                     {{1, absent, ""}, {30, absent, ""}, {61, gone(), "deleted"}, {90, gone(), ""}},
		"believed late, dated early": {{1, absent, ""}, {30, absent, ""}, {600, gone(), "deleted"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStory(p)
			s.observe(seen("a"), at(0))
			for _, a := range answers {
				if got := short(s.observe(a.o, at(a.minute))); got != a.events {
					t.Errorf("minute %v: %q, want %q", a.minute, got, a.events)
				}
			}
			if i := slices.IndexFunc(s.events, func(e audit.Event) bool { return e.Type == audit.Deleted }); i >= 0 {
				e := s.events[i]
				if !e.Interval.NotBefore.Equal(at(0)) || !e.Interval.NotAfter.Equal(at(1)) || e.Policy.Effect != "refusing" {
					t.Errorf("deleted between %v and %v, %s; want from the last answer to the first absence", e.Interval.NotBefore, e.Interval.NotAfter, e.Policy.Effect)
				}
			}
			s.check(t)
		})
	}
}

// R7: deleted and created again is one event, whatever it is now, and what was
// decided about the tag holds over it.
func TestR7RestoredIsOneEvent(t *testing.T) {
	for _, name := range []string{"a", "b"} {
		s := newStory(compile(t, audit.RuleText{Mode: audit.Immutable}))
		s.observe(seen("a"), at(0))
		s.observe(absent, at(1))
		s.observe(absent, at(30))
		s.observe(gone(), at(62))
		events := s.observe(seen(name), at(100))
		if events[0].Type != audit.Restored || events[0].Old.Digest != audittest.Digest("a") || events[0].New.Digest != audittest.Digest(name) {
			t.Errorf("restored as %q: %+v", name, events[0])
		}
		if s.state.Served != audittest.Digest("a") || (len(events) == 2) != (name == "b") {
			t.Errorf("restored as %q: %s is served, %s", name, s.state.Served, short(events))
		}
		s.check(t)
	}
}

// R8, R10: a move says what it looks like, and one of wrapping only is of a type
// of its own, unless it goes back.
func TestR8R10MovesAreClassified(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	s.observe(seen("a"), at(0))
	move := func(name string, class audit.Class, minute float64) audit.Event {
		o := seen(name)
		o.Change = &audit.Comparison{Old: s.state.Head, New: o.Digest, Class: class}
		return s.observe(o, at(minute))[0]
	}
	for i, tt := range []struct {
		name  string
		class audit.Class
		typ   audit.Type
		want  audit.Class
	}{
		{"b", audit.ClassRepackaged, audit.Repackaged, audit.ClassRepackaged},
		{"c", audit.ClassAttestationOnly, audit.Moved, audit.ClassAttestationOnly},
		{"d", "", audit.Moved, audit.ClassUnknown},
		{"a", "", audit.Reverted, audit.ClassRollback},
		{"b", audit.ClassRepackaged, audit.Reverted, audit.ClassRepackaged},
	} {
		if e := move(tt.name, tt.class, float64(20*(i+1))); e.Type != tt.typ || e.Class != tt.want {
			t.Errorf("move %d is %s, %s; want %s, %s", i, e.Type, e.Class, tt.typ, tt.want)
		}
	}
	stale := seen("e")
	stale.Change = &audit.Comparison{Old: audittest.Digest("x"), New: stale.Digest, Class: audit.ClassRepackaged}
	if e := s.observe(stale, at(200))[0]; e.Type != audit.Moved || e.Class != audit.ClassUnknown {
		t.Errorf("a comparison with another head made the move %s, %s", e.Type, e.Class)
	}
	s.check(t)
}

// R9: a tag that becomes an index, or stops being one, has moved, and says so.
func TestR9IndexAndSingleAreSignalled(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	s.observe(seen("a"), at(0))
	o := seen("b")
	o.Change = &audit.Comparison{Old: s.state.Head, New: o.Digest, Class: audit.ClassPlatformAdded, Signals: []string{"became_index"}}
	if e := s.observe(o, at(1))[0]; e.Type != audit.Moved || e.Class != audit.ClassPlatformAdded || fmt.Sprint(e.Signals) != "[became_index]" {
		t.Errorf("event is %s, %s, %v", e.Type, e.Class, e.Signals)
	}
}

// R11: an index that is put together over hours belongs to the move that began
// it: each step is on the record and amends the one before, and a step that is
// replaced by the next was not taken back.
func TestR11IndexThatGrowsAmends(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Cooldown, Age: 48 * hour}))
	s.observe(seen("a"), at(0))
	first := s.observe(seen("b"), at(100))[0]
	grow := func(name string, minute float64) []audit.Event {
		o := seen(name)
		o.Change = &audit.Comparison{Old: s.state.Head, New: o.Digest, Class: audit.ClassPlatformAdded}
		return s.observe(o, at(minute))
	}
	second := grow("c", 160)
	if second[0].Amends == nil || *second[0].Amends != first.ID || short(second) != "moved held" {
		t.Errorf("the second step amends %v: %s; want event %v, and nothing withdrawn", second[0].Amends, short(second), first.ID)
	}
	third := grow("d", 160+25*60)
	if third[0].Amends != nil || !strings.Contains(short(third), "held") {
		t.Errorf("a day later it amends %v: %s; want a move of its own", third[0].Amends, short(third))
	}
	s.check(t)
}

// R13: a move that only one machine of upstream tells of is not settled until
// another does, or for a quarter of an hour.
func TestR13OneEdgeIsNotEnough(t *testing.T) {
	for _, tt := range []struct {
		edge    string
		minutes float64
		settled bool
	}{{"fra", 10, false}, {"iad", 10, true}, {"iad", 0.3, false}, {"fra", 16, true}, {"", 10, true}} {
		s := newStory(compile(t, audit.RuleText{Mode: audit.Alert}))
		s.observe(from("fra", "a"), at(0))
		s.observe(from("fra", "b"), at(1))
		s.observe(from(tt.edge, "b"), at(1+tt.minutes))
		if s.state.Settled() != tt.settled {
			t.Errorf("confirmed from %q after %v minutes: settled %t, want %t", tt.edge, tt.minutes, s.state.Settled(), tt.settled)
		}
	}
}

// R14: while the clock is more than five minutes behind the newest entry, nothing
// that waits for its time is served. That is on the record, which is then the
// newest entry: time goes on from there.
func TestR14ClockThatIsSetBack(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Cooldown, Age: hour, Tenure: tenure(0)}))
	s.observe(seen("a"), at(0))
	s.observe(seen("b"), at(10))
	s.last = at(300) // somebody else's event: the log is further than this clock
	if got := short(s.observe(seen("b"), at(80))); got != "audit.gap" || s.state.Served != audittest.Digest("a") {
		t.Errorf("the clock was set back: %q, %s is served; want a gap, and what was served", got, s.state.Served)
	}
	if g := s.events[len(s.events)-1].Gap; g.Cause != "clock" || !g.Start.Equal(at(300)) {
		t.Errorf("the gap is %+v", g)
	}
	if got := short(s.observe(seen("b"), at(81))); got != "released" || s.state.Served != audittest.Digest("b") {
		t.Errorf("from there on: %q, %s is served", got, s.state.Served)
	}
	little := newStory(compile(t, audit.RuleText{Mode: audit.Cooldown, Age: hour, Tenure: tenure(0)}))
	little.observe(seen("a"), at(0))
	little.observe(seen("b"), at(10))
	little.last = at(74)
	if got := short(little.observe(seen("b"), at(71))); got != "released" {
		t.Errorf("three minutes behind: %q, want no fuss", got)
	}
	s.check(t)
}

// R15: a mirror's tags lag, so that a flip counts for longer before it is settled
// or calm.
func TestR15MirrorsAreGivenMoreTime(t *testing.T) {
	for _, tt := range []struct {
		mirrors []string
		settled bool
		flaps   bool
	}{{nil, true, false}, {[]string{"docker.io"}, false, true}} {
		p := compileText(t, audit.PolicyText{Mirrors: tt.mirrors, Rules: []audit.RuleText{{Match: "**", Mode: audit.Observe}}})
		s := newStory(p)
		s.observe(seen("a"), at(0))
		s.observe(seen("b"), at(1))
		s.observe(seen("b"), at(11))
		if s.state.Settled() != tt.settled {
			t.Errorf("mirrors %v: settled after ten minutes: %t, want %t", tt.mirrors, s.state.Settled(), tt.settled)
		}
		s.observe(seen("a"), at(13))
		s.observe(seen("b"), at(25))
		if got := slices.ContainsFunc(s.events, isFlap); got != tt.flaps {
			t.Errorf("mirrors %v: three changes in 24 minutes are flapping: %t, want %t", tt.mirrors, got, tt.flaps)
		}
	}
}

// R16: with other credentials, or another Accept profile, upstream may show
// something else: a move that comes with such a change says so.
func TestR16OtherCredentialsAreABaseline(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	s.observe(seen("a"), at(0))
	as := func(identity, name string) audit.Observation {
		o := seen(name)
		o.Evidence.Identity = identity
		return o
	}
	if e := s.observe(as("user-1", "b"), at(1))[0]; !e.Rebaseline {
		t.Error("a move with other credentials is told as any other")
	}
	if e := s.observe(as("user-1", "c"), at(2))[0]; e.Rebaseline {
		t.Error("the next move with the same credentials is told as a baseline")
	}
	s.observe(as("user-2", "c"), at(3))
	if e := s.observe(as("user-2", "d"), at(4))[0]; e.Rebaseline {
		t.Error("credentials that had confirmed the head are told as a baseline")
	}
}

// R17: a tag that could not be asked about for too long has a gap on the record
// when it answers again, with its cause; a short one has not.
func TestR17GapsAreOnTheRecord(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	s.observe(seen("a"), at(0))
	back := seen("a")
	back.Blind = "docker.io: 503 Service Unavailable"
	if got := short(s.observe(back, at(30))); got != "" {
		t.Errorf("after half an hour: %q, want nothing", got)
	}
	events := s.observe(back, at(90))
	if short(events) != "audit.gap" || !events[0].Gap.Start.Equal(at(30)) || !events[0].Gap.End.Equal(at(90)) || events[0].Gap.Cause != "upstream" || events[0].Reason != back.Blind {
		t.Errorf("after an hour: %+v", events)
	}
	if got := short(s.observe(seen("a"), at(500))); got != "" {
		t.Errorf("nobody asked for hours: %q, want nothing: that is no gap", got)
	}
	back.Every = 2 * time.Hour
	if got := short(s.observe(back, at(500+300))); got != "" {
		t.Errorf("asked about every two hours, no answer for five: %q, want nothing", got)
	}
	if got := short(s.observe(back, at(800+370))); got != "audit.gap" {
		t.Errorf("no answer for more than six: %q, want a gap", got)
	}
}
