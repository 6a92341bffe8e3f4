package watch

import (
	"math"
	"time"
)

// A Pace is how often a tag is asked about. Base is for one of which nothing is
// known yet; Floor and Ceiling bound what is learned.
type Pace struct{ Base, Floor, Ceiling time.Duration }

// A Cadence is what is known of how a tag moves, and who cares.
type Cadence struct {
	Moves   int           // seen
	Watched time.Duration // for how long the tag has been known
	Clients int           // that pulled it lately
}

// fraction is the part of the time between two moves after which a tag is asked
// about again: a move is then seen, on average, within a quarter of a percent of
// the time that the tag stood still.
const fraction = 1. / 200

// Interval is how long to wait before the tag is asked about again: a fraction of
// the time that lies between its moves. What is expected before anything is known
// weighs as much as one move; twice the clients, a little sooner.
func (p Pace) Interval(c Cadence) time.Duration {
	prior := float64(p.Base) / fraction
	between := (float64(c.Watched) + prior) / float64(c.Moves+1)
	popular := 1 + math.Log2(float64(max(1, c.Clients)))/2
	return time.Duration(min(max(between*fraction/popular, float64(p.Floor)), float64(p.Ceiling)))
}

// A Rate is what an upstream said of its rate limit. The zero Rate was not told.
type Rate struct{ Limit, Remaining int64 }

// clientsShare is what is left of a limit to those who pull (AUDIT.md, R12).
const clientsShare = 0.3

// spent tells that what is left of the limit is for clients.
func (r Rate) spent() bool {
	return r.Limit > 0 && float64(r.Remaining) <= clientsShare*float64(r.Limit)
}
