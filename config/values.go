package config

import (
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Duration is written as 90s, 1h30m, 250ms or 30d.
type Duration time.Duration

// ParseDuration reads a duration, whose units may be days too.
func ParseDuration(s string) (Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 32)
		if err != nil || n > math.MaxInt64/uint64(24*time.Hour) {
			return 0, fmt.Errorf("%q is not a duration such as 90s, 72h or 30d", s)
		}
		return Duration(time.Duration(n) * 24 * time.Hour), nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a duration such as 90s, 72h or 30d", s)
	}
	return Duration(d), nil
}

func (d *Duration) parse(s string) (err error) {
	*d, err = ParseDuration(s)
	return err
}

func (d Duration) String() string {
	t := time.Duration(d)
	if day := 24 * time.Hour; t != 0 && t%day == 0 {
		return strconv.FormatInt(int64(t/day), 10) + "d"
	}
	s := t.String() // 1h0m0s
	s = strings.TrimSuffix(s, "m0s") + map[bool]string{true: "m"}[strings.HasSuffix(s, "m0s")]
	return strings.TrimSuffix(s, "h0m") + map[bool]string{true: "h"}[strings.HasSuffix(s, "h0m")]
}

// A Time is written as 2026-07-01, which is its first second in UTC, or as
// 2026-07-01T12:30:00Z.
type Time struct{ time.Time }

func (t *Time) parse(s string) (err error) {
	layout := time.RFC3339
	if len(s) == len(time.DateOnly) {
		layout = time.DateOnly
	}
	if t.Time, err = time.Parse(layout, s); err != nil {
		return fmt.Errorf("%.100q is not a date such as 2026-07-01, or a time such as 2026-07-01T12:30:00Z", s)
	}
	return nil
}

func (t Time) String() string {
	if t.IsZero() {
		return `""`
	}
	return t.UTC().Format(time.RFC3339)
}

// A Size is written as 10GiB, 500MB or 4096, in bytes, or as 80%.
type Size struct {
	Bytes   int64
	Percent float64 // of the file system; Bytes is 0 then
}

// units of sizes, longest suffixes first.
var units = []struct {
	suffix string
	bytes  float64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12},
	{"K", 1 << 10}, {"M", 1 << 20}, {"G", 1 << 30}, {"T", 1 << 40}, {"B", 1},
}

// ParseSize reads a size or a percentage.
func ParseSize(s string) (Size, error) {
	bad := fmt.Errorf("%q is not a size such as 10GiB, or a share such as 80%%", s)
	if p, ok := strings.CutSuffix(s, "%"); ok {
		v, err := strconv.ParseFloat(strings.TrimSpace(p), 64)
		if err != nil || !(v > 0 && v <= 100) {
			return Size{}, bad
		}
		return Size{Percent: v}, nil
	}
	factor := 1.0
	for _, u := range units {
		if n, ok := strings.CutSuffix(s, u.suffix); ok {
			s, factor = strings.TrimSpace(n), u.bytes
			break
		}
	}
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || !(v >= 0 && v*factor < math.MaxInt64) {
		return Size{}, bad
	}
	return Size{Bytes: int64(v * factor)}, nil
}

func (z *Size) parse(s string) (err error) {
	*z, err = ParseSize(s)
	return err
}

// Of returns the size in bytes, of a file system with total bytes.
func (z Size) Of(total int64) int64 {
	if z.Percent > 0 {
		return int64(float64(total) * z.Percent / 100)
	}
	return z.Bytes
}

func (z Size) String() string {
	if z.Percent > 0 {
		return strconv.FormatFloat(z.Percent, 'f', -1, 64) + "%"
	}
	for i := 3; i >= 0; i-- {
		if u := units[i]; z.Bytes > 0 && z.Bytes%int64(u.bytes) == 0 {
			return strconv.FormatInt(z.Bytes/int64(u.bytes), 10) + u.suffix
		}
	}
	return strconv.FormatInt(z.Bytes, 10)
}

// A Secret is a text that no log, error or page shows.
type Secret string

// String is what may be shown.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "redacted"
}

// GoString keeps %#v from showing what String hides.
func (s Secret) GoString() string { return s.String() }

// MarshalText keeps encoders from showing what String hides.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// A Webhook is an address of which only the host may be shown: paths and queries
// of webhooks are often their secret.
type Webhook string

func (w *Webhook) parse(s string) error {
	*w = Webhook(s)
	return nil
}

// String is what may be shown.
func (w Webhook) String() string {
	if w == "" {
		return `""`
	}
	u, err := url.Parse(string(w))
	if err != nil {
		return "redacted"
	}
	if !slices.Contains([]string{"http", "https", "smtp", "smtps", "udp", "tcp", "tls"}, u.Scheme) {
		return u.Scheme + "://redacted" // some services have their secrets where others have a host
	}
	return u.Scheme + "://" + u.Host + "/redacted"
}

// GoString keeps %#v from showing what String hides.
func (w Webhook) GoString() string { return w.String() }
