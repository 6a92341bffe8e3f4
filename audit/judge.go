package audit

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// What a move looks like beside the other tags of its repository. Attacks with a
// publisher's credentials overwrite several tags at once, and put one image under
// versions that should differ; neither shows in a single tag (AUDIT.md, A2, A8.4).

const (
	BurstWindow  = time.Hour
	BurstRefs    = 3                   // that move within it
	burstStable  = 30 * 24 * time.Hour // and stood for so long before, or are full versions
	AliasWindow  = 24 * time.Hour      // after a move in which a new tag with its digest is suspicious
	learnedMoves = 2                   // of full versions, or hours in which many tags moved: then it is the custom here
)

// A Neighbourhood is what is known of the repository of a ref that moves.
type Neighbourhood struct {
	Moves int       // of the ref itself, so far
	Since time.Time // when it was first seen

	Same   []string        // other tags whose head is the new digest
	Before []string        // other tags whose head is or was the old one
	Recent []SiblingMove   // of other tags, within AliasWindow, each tag's last
	Stood  []time.Duration // for how long the ref meant each of its digests, the last ones

	// MovedVersions is how often full versions moved here, Bursts how many hours saw
	// BurstRefs tags move, before BurstWindow. LastBurst is when one was told last.
	MovedVersions int
	Bursts        int
	LastBurst     time.Time
}

// A SiblingMove is that another tag of the repository moved.
type SiblingMove struct {
	Tag   string
	At    time.Time
	Stood time.Duration // for how long it had meant what it meant before
	Class Class
}

// judge adds to a move what it looks like beside the other tags of its repository, and
// returns the events that are about more than the tag.
func (t *turn) judge(e *Event) (more []Event) {
	if t.r.Neighbours == nil || e.New == nil || e.Old != nil && e.Old.Digest == e.New.Digest {
		return nil
	}
	moved := e.Type != FirstSeen
	if !moved && versionCore(t.ref.Tag) == "" {
		return nil // it can be no alias
	}
	old := digest.Digest("")
	if e.Old != nil {
		old = e.Old.Digest
	}
	n := t.r.Neighbours(old, e.New.Digest, t.now)
	if moved {
		e.Signals = slices.Clone(e.Signals)
		if e.Class == ClassUnknown {
			e.Class = classOfTags(n)
		}
		if stood := t.now.Sub(n.Since); n.Moves == 0 && stood >= burstStable {
			e.Signals = append(e.Signals, fmt.Sprintf("never_moved_before:%dd", stood/(24*time.Hour)))
		}
		if FullVersion(t.ref.Tag) && !n.versionsMove(t.ref) {
			e.Signals = append(e.Signals, "full_version_tag")
		}
	}
	if tags := t.aliases(n, moved); len(tags) > 0 {
		if moved {
			e.Signals = append(e.Signals, "alias:"+tags[0])
		}
		more = append(more, Event{Type: Aliased, New: e.New, Tags: tags})
	}
	if !moved || trivial(e.Class) || e.Rebaseline {
		return more
	}
	stood := t.now.Sub(t.r.State.HeadSince)
	if z, ok := unusual(stood, n.Stood); ok {
		e.Signals = append(e.Signals, fmt.Sprintf("cadence_z:%+.1f", z))
	}
	if moved := n.movedWithin(t.now); moved > 0 {
		e.Signals = append(e.Signals, fmt.Sprintf("siblings_moved:%d", moved))
	}
	self := SiblingMove{Tag: t.ref.Tag, At: t.now, Stood: stood, Class: e.Class}
	tags := burst(n, t.ref, self, t.now)
	if len(tags) >= BurstRefs {
		e.Signals = append(e.Signals, fmt.Sprintf("burst:%d", len(tags)))
		if t.now.Sub(n.LastBurst) > BurstWindow {
			more = append(more, Event{Type: Burst, Old: e.Old, New: e.New, Tags: tags})
		}
	}
	return more
}

// trivial tells changes that say nothing about the publisher: the images are the same,
// or only what is below them is new, and is what we saw their base move to.
func trivial(c Class) bool {
	return c == ClassRepackaged || c == ClassAttestationOnly || c == ClassPlatformAdded || c == ClassBaseRefresh
}

// movedWithin counts the other tags that moved within BurstWindow.
func (n Neighbourhood) movedWithin(now time.Time) (moved int) {
	for _, m := range n.Recent {
		if now.Sub(m.At) <= BurstWindow {
			moved++
		}
	}
	return moved
}

const (
	cadenceFrom = 5 // moves before a ref has a cadence
	cadenceZ    = 3 // standard deviations from the mean that are worth a word
)

// unusual tells by how many standard deviations a ref stood longer, or shorter, than it
// does on average.
func unusual(stood time.Duration, before []time.Duration) (z float64, ok bool) {
	if len(before) < cadenceFrom {
		return 0, false
	}
	var sum, squares float64
	for _, d := range before {
		sum += d.Hours()
	}
	mean := sum / float64(len(before))
	for _, d := range before {
		squares += (d.Hours() - mean) * (d.Hours() - mean)
	}
	deviation := math.Sqrt(squares / float64(len(before)))
	if deviation == 0 {
		return 0, false
	}
	z = (stood.Hours() - mean) / deviation
	return z, math.Abs(z) >= cadenceZ
}

// versionsMove tells whether it is usual here that full versions move: it was learned,
// or they are of Docker's official images, which are rebuilt under them by design.
func (n Neighbourhood) versionsMove(ref Ref) bool {
	return n.MovedVersions >= learnedMoves || ref.Upstream == "docker.io" && strings.HasPrefix(ref.Repository, "library/")
}

// burst returns the tags that moved within an hour although they do not usually, in
// order of their names. Tags that are no full versions move together with every release:
// that counts only beside something that is none.
func burst(n Neighbourhood, ref Ref, self SiblingMove, now time.Time) []string {
	var tags []string
	odd := 0 // of them, that no release explains
	for _, m := range append([]SiblingMove{self}, n.Recent...) {
		version := FullVersion(m.Tag) && !n.versionsMove(ref)
		stable := m.Stood >= burstStable && n.Bursts < learnedMoves
		if now.Sub(m.At) > BurstWindow || !version && !stable || trivial(m.Class) || slices.Contains(tags, m.Tag) {
			continue
		}
		tags = append(tags, m.Tag)
		if version || m.Class != ClassRelease && m.Class != ClassRebuild {
			odd++
		}
	}
	if odd == 0 {
		return nil
	}
	slices.Sort(tags)
	return tags[:min(len(tags), tagsMost)]
}

// tagsMost bounds the tags that an event names.
const tagsMost = 100

// aliases returns the other full versions, of other numbers, whose head is the digest
// too. Tags that were like that when they were seen first are no sign of anything: one
// of the two must have moved.
func (t *turn) aliases(n Neighbourhood, moved bool) []string {
	core := versionCore(t.ref.Tag)
	if core == "" {
		return nil
	}
	var tags []string
	for _, tag := range n.Same {
		other := versionCore(tag)
		lately := slices.ContainsFunc(n.Recent, func(m SiblingMove) bool { return m.Tag == tag })
		if other != "" && other != core && (moved || lately) {
			tags = append(tags, tag)
		}
	}
	slices.Sort(tags)
	return tags[:min(len(tags), tagsMost)]
}
