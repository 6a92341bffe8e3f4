package audit

import (
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Moment is a point in the life of a log: a time, or the place right after one
// of its entries. Times are as this server's clock was; places are certain.
type Moment struct {
	at      time.Time
	index   int64
	byIndex bool
}

// AtTime is the moment of a time, to the millisecond.
func AtTime(t time.Time) Moment { return Moment{at: t.UTC().Truncate(time.Millisecond)} }

// AtIndex is the moment right after entry n.
func AtIndex(n int64) Moment { return Moment{index: n, byIndex: true} }

// Time is the time that the moment is of, unless it is the place of an entry.
func (m Moment) Time() (t time.Time, ok bool) { return m.at, !m.byIndex }

// Index is the entry that the moment follows, unless it is a time.
func (m Moment) Index() (n int64, ok bool) { return m.index, m.byIndex }

func (m Moment) String() string {
	if m.byIndex {
		return "entry " + strconv.FormatInt(m.index, 10)
	}
	return m.at.Format(time.RFC3339)
}

// reached tells whether an event had happened by then.
func (m Moment) reached(index int64, e Event) bool {
	if m.byIndex {
		return index <= m.index
	}
	return !e.Time.After(m.at)
}

// Whose word it is that a ref meant something.
const (
	Observed = "observed"          // this server's own
	Imported = "imported"          // that of a log whose bundle was imported
	Asserted = "upstream-asserted" // upstream's, about its own past
)

// A Claim is a time in which a ref meant a digest by the word of somebody else or, with
// Served, in which that somebody's clients were given it.
type Claim struct {
	Basis         string // Imported or Asserted
	Served        bool   // only of an imported log
	Source        string // a log's origin, or which of an upstream's lists
	Digest        digest.Digest
	MediaType     string
	Size          int64 // of the manifest in bytes, 0 when not told
	NotBefore     *time.Time
	Since         time.Time
	LastConfirmed time.Time
	Until         *time.Time // when it meant another, nil when the source does not know of an end
	EndReason     string     // the type of the event that ended it, or ""
	SourceIndex   *int64     // of the event that began it in the source's log
	Index         int64      // of the event of this log by which the claim came here
}

// covers tells whether the claim is about a time.
func (c Claim) covers(t time.Time) bool {
	return !t.Before(c.Since) && (c.Until == nil || t.Before(*c.Until))
}

// A Chronicle is all that a log, and others by their word, know of a ref.
type Chronicle struct {
	Ref      Ref
	Entries  []Entry // about the ref, oldest first
	Stints   []Stint // newest first
	Claims   []Claim // newest first
	Gaps     []Blind // in which nothing at all was observed
	Rejected map[digest.Digest]bool
	Withheld map[digest.Digest]bool // heads that were never served, and may not be yet
	Size     int64                  // of the log, in entries

	// GapAfter is for how long a digest is taken to have lasted after it was last
	// confirmed.
	GapAfter time.Duration
}

// A Then is what a ref meant at a moment.
type Then struct {
	Digest digest.Digest
	Basis  string
	Source string // with a basis other than Observed, whose word it is
	Index  int64  // of the entry of this log that says so
	From   time.Time
	Until  *time.Time // nil while it lasts

	// Gap is why it may have meant something else at that time all the same, or "".
	Gap string
}

// A PastError is fs.ErrNotExist about what a ref meant at a moment.
type PastError struct {
	Ref      Ref
	Moment   Moment
	What     string
	Earliest *time.Time // from when on something is known, if anything is
}

func (e *PastError) Error() string {
	return fmt.Sprintf("%s as of %s: %s", e.Ref, e.Moment, e.What)
}

func (*PastError) Unwrap() error { return fs.ErrNotExist }

// AsOf says what clients were given for the ref at a moment. What was recorded here
// counts. Of a time before that an imported log is asked, which was there, for what its
// clients were given; then upstream, about its own past. A moment that is yet to come,
// one before all that is known, one at which upstream had deleted the ref or nothing
// was served, and a digest that an operator has rejected since are each a PastError. It
// depends on the Chronicle and now alone.
func (c Chronicle) AsOf(m Moment, now time.Time) (Then, error) {
	if at, ok := m.Time(); ok && at.After(now) || !ok && m.index >= c.Size {
		return Then{}, c.refuse(m, "that is yet to come")
	}
	events := make([]Event, len(c.Entries))
	for i, entry := range c.Entries {
		var err error
		if events[i], err = ParseLeaf(entry.Leaf); err != nil {
			return Then{}, fmt.Errorf("entry %d: %w", entry.Index, err)
		}
	}
	s, known := c.recorded(m, events)
	at, byTime := m.Time()
	if byTime && !known {
		s, known = c.claimed(at)
	}
	switch {
	case !known:
		return Then{}, c.refuse(m, "that is before it was first seen")
	case s.deleted:
		return Then{}, c.refuse(m, "upstream had deleted it")
	case s.Digest == "":
		return Then{}, c.refuse(m, "nothing was served for it")
	case c.Rejected[s.Digest]:
		return Then{}, c.refuse(m, fmt.Sprintf("%s was rejected", s.Digest))
	}
	if byTime {
		s.Gap = c.gapAt(at, s.Then, events)
	}
	return s.Then, nil
}

func (c Chronicle) refuse(m Moment, what string) error {
	return &PastError{c.Ref, m, what, c.earliest()}
}

// earliest is from when on something is known.
func (c Chronicle) earliest() *time.Time {
	var first *time.Time
	for _, st := range c.Stints {
		if t := st.FirstSeen; first == nil || t.Before(*first) {
			first = &t
		}
	}
	for _, cl := range c.Claims {
		if t := cl.Since; cl.counts() && (first == nil || t.Before(*first)) {
			first = &t
		}
	}
	return first
}

// A stretch is a time in which the same was served, or nothing.
type stretch struct {
	Then
	deleted bool
}

// recorded is what this log says of a moment, if it knew the ref then. Where the
// clock was set back, an entry can be of an earlier time than the one before it:
// the last one that had happened by then counts.
func (c Chronicle) recorded(m Moment, events []Event) (s stretch, known bool) {
	last := -1
	for i, e := range events {
		if m.reached(c.Entries[i].Index, e) {
			last = i
		}
	}
	if last < 0 {
		return stretch{}, false
	}
	basis := make(map[digest.Digest]string) // of heads
	for i, e := range events {
		if e.Type.Moves() {
			basis[e.New.Digest] = e.Basis()
		}
		next := stretch{Then{Digest: e.Policy.Served, Basis: basis[e.Policy.Served], Index: c.Entries[i].Index, From: e.Time}, s.deleted && !e.Type.Moves() || e.Type == Deleted}
		same := i > 0 && next.Digest == s.Digest && next.deleted == s.deleted
		switch {
		case !same && i > last:
			s.Until = &e.Time
			return s, true
		case !same:
			s = next
		}
	}
	return s, true
}

// Basis is whose word it is that the ref's head is New.
func (e Event) Basis() string {
	if e.Evidence.Trigger == TriggerImport {
		return Imported
	}
	return Observed
}

// counts tells whether a claim is about what clients are given of the past. Upstream has
// no other word.
func (c Claim) counts() bool { return c.Served || c.Basis == Asserted }

// claimed is what others say of a time at which the ref was not known here, if they do: a
// log that was imported or, where none was, upstream.
func (c Chronicle) claimed(at time.Time) (stretch, bool) {
	for _, basis := range []string{Imported, Asserted} {
		reaches := false // back to that time
		for _, cl := range c.Claims {
			if cl.Basis != basis || !cl.counts() || c.Withheld[cl.Digest] {
				continue
			}
			if cl.covers(at) {
				return stretch{Then: Then{Digest: cl.Digest, Basis: basis, Source: cl.Source, Index: cl.Index, From: cl.Since, Until: c.untilSeen(cl.Until)}}, true
			}
			reaches = reaches || !at.Before(cl.Since)
		}
		if reaches {
			return stretch{Then: Then{Basis: basis}, deleted: true}, true
		}
	}
	return stretch{}, false
}

// untilSeen is the end of a claim, at the latest when the ref was first seen here.
func (c Chronicle) untilSeen(until *time.Time) *time.Time {
	if len(c.Stints) == 0 {
		return until
	}
	if first := c.Stints[len(c.Stints)-1].FirstSeen; until == nil || until.After(first) {
		return &first
	}
	return until
}

// gapAt is why what was found may not be what the ref meant, or "".
func (c Chronicle) gapAt(at time.Time, then Then, events []Event) string {
	for _, g := range c.Gaps {
		if at.After(g.Start) && at.Before(g.End) {
			return blindness(g)
		}
	}
	for _, e := range events {
		if e.Gap != nil && at.After(e.Gap.Start) && at.Before(e.Gap.End) {
			return blindness(*e.Gap)
		}
	}
	confirmed := time.Time{}
	if then.Basis == Observed {
		i := slices.IndexFunc(c.Stints, func(st Stint) bool { return !st.FirstSeen.After(at) })
		if i < 0 {
			return ""
		}
		confirmed = c.Stints[i].LastConfirmed
	} else {
		for _, cl := range c.Claims {
			if cl.Basis == then.Basis && cl.counts() && cl.Source == then.Source && cl.covers(at) {
				confirmed = cl.LastConfirmed
			}
		}
	}
	if confirmed.IsZero() || at.Sub(confirmed) <= c.GapAfter {
		return ""
	}
	return "it was last confirmed at " + confirmed.Format(time.RFC3339)
}

func blindness(g Blind) string {
	return fmt.Sprintf("nothing was observed from %s to %s (%s)", g.Start.Format(time.RFC3339), g.End.Format(time.RFC3339), g.Cause)
}
