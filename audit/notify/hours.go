package notify

import (
	"fmt"
	"strings"
	"time"
)

// Times of the day.

// A TimeOfDay is minutes since midnight, of the machine's own clock.
type TimeOfDay int

// ParseTimeOfDay reads daily@08:00.
func ParseTimeOfDay(s string) (TimeOfDay, error) {
	t, err := time.Parse("daily@15:04", s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a time such as daily@08:00", s)
	}
	return TimeOfDay(t.Hour()*60 + t.Minute()), nil
}

// Next is the first such time after now.
func (d TimeOfDay) Next(now time.Time) time.Time {
	y, m, day := now.Date()
	at := time.Date(y, m, day, int(d)/60, int(d)%60, 0, 0, now.Location())
	if !at.After(now) {
		at = time.Date(y, m, day+1, int(d)/60, int(d)%60, 0, 0, now.Location())
	}
	return at
}

// Hours are from a time of the day until another, which may be the next day. The zero
// Hours are none.
type Hours struct{ From, Until TimeOfDay }

// ParseHours reads 22:00-07:00.
func ParseHours(s string) (h Hours, err error) {
	from, until, ok := strings.Cut(s, "-")
	f, err1 := time.Parse("15:04", from)
	u, err2 := time.Parse("15:04", until)
	if !ok || err1 != nil || err2 != nil || f.Equal(u) {
		return Hours{}, fmt.Errorf("%q are no hours such as 22:00-07:00", s)
	}
	return Hours{TimeOfDay(f.Hour()*60 + f.Minute()), TimeOfDay(u.Hour()*60 + u.Minute())}, nil
}

// End is when the hours that at is in are over, or at.
func (h Hours) End(at time.Time) time.Time {
	if h.From == h.Until {
		return at
	}
	local := at.Local()
	now := TimeOfDay(local.Hour()*60 + local.Minute())
	in := now >= h.From && now < h.Until
	if h.From > h.Until { // over midnight
		in = now >= h.From || now < h.Until
	}
	if !in {
		return at
	}
	return h.Until.Next(local)
}
