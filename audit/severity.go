package audit

import (
	"slices"
	"strings"
	"time"
)

// A Severity is how much an event deserves to be looked at. docs/alerts.md has the
// table that gives it.
type Severity int

// The severities, from the least.
const (
	Info Severity = iota
	Notice
	Warning
	High
	Critical
)

var severities = []string{"info", "notice", "warning", "high", "critical"}

func (s Severity) String() string { return severities[s] }

// ParseSeverity reads the name of a severity.
func ParseSeverity(name string) (Severity, bool) {
	for i, n := range severities {
		if n == name {
			return Severity(i), true
		}
	}
	return 0, false
}

// byType is of types that say it all.
var byType = map[Type]Severity{
	FirstSeen: Info, Repackaged: Info, Released: Info, Action: Info, Snapshot: Info,
	Rejected: Notice, Flapping: Notice, Gap: Notice,
	Reverted: Warning, Deleted: Warning, Restored: Warning, Held: Warning, Withdrawn: Warning, Starved: Warning, TrustChanged: Warning,
	AccessLost: Warning, Degraded: Warning, Recovered: Warning,
	Inconsistent: High, Aliased: High,
	Violation: Critical, Forked: Critical, DeadLetter: Critical, ExposureFound: Critical, Burst: Critical, Downgraded: Critical,
}

// byClass is of moves, by what they look like.
var byClass = map[Class]Severity{
	ClassRepackaged: Info, ClassAttestationOnly: Info, ClassPlatformAdded: Info,
	ClassBaseRefresh: Info, ClassRelease: Info,
	ClassRebuild: Notice, ClassPlatformRemoved: Notice, ClassUnknown: Notice,
	ClassRollback: Warning,
}

// bySignal is of signals, without what follows their colon.
var bySignal = map[string]Severity{
	"cmd_changed": Notice, "ports_changed": Notice, "volume_added": Notice, "no_shared_layers": Notice,
	"revision_missing": Notice, "created_epoch": Notice, "created_regressed": Notice,
	"never_moved_before": Notice, "created_future": Notice, NotCompared: Notice, "cadence_z": Notice, "size_delta_pct": Notice,
	"full_version_tag": Warning, "entrypoint_changed": Warning, "platform_removed": Warning, "source_changed": Warning,
	"user_to_root": High, "env_added": High, "alias": High,
	"burst": Critical,
}

// Severity is the most that its type, its class and one of its signals give.
func (e Event) Severity() Severity {
	s := byType[e.Type]
	switch {
	case e.Type == Held && e.Policy.Mode == Cooldown && e.Policy.Until != nil:
		s = Notice // it ends by itself
	case e.Type == Withdrawn && e.Reason == "replaced":
		return Notice // it was not gone back from
	case e.Type == Held, !e.Type.Moves(), e.Type == FirstSeen, e.Type == Repackaged:
		return s
	}
	if slices.Contains(e.Signals, Unconsumed) {
		return e.ofUnconsumed() // AUDIT.md, R8
	}
	s = max(s, byClass[e.Class])
	for _, name := range e.Signals {
		name, _, _ = strings.Cut(name, ":")
		s = max(s, bySignal[name])
	}
	if e.Type == Held && s == Warning && e.Policy.Until.Sub(e.Time) >= aDay {
		return Notice // there is time to read of it in a daily digest
	}
	return s
}

// aDay is how long nobody gets what is held, so that it need not be told at once.
const aDay = 24 * time.Hour

// The signals of what the comparison itself is like.
const (
	Unconsumed  = "unconsumed"   // no platform changed that clients have
	NotCompared = "not_compared" // a configuration could not be had, although clients have the old one
)

// ofUnconsumed is the severity of a move that changes no platform that clients have: of
// its signals those count that are about more than one tag.
func (e Event) ofUnconsumed() (s Severity) {
	for _, name := range e.Signals {
		if name, _, _ = strings.Cut(name, ":"); name == "burst" || name == "alias" {
			s = max(s, bySignal[name])
		}
	}
	return s
}
