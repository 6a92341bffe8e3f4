package config_test

import (
	"math"
	"testing"
	"testing/quick"
	"time"

	"tidemark/config"
)

// A duration is what an operator writes, and is shown as one would write it.
func TestDurations(t *testing.T) {
	for _, tt := range []struct {
		in    string
		want  time.Duration
		shown string
	}{
		{"0", 0, "0s"},
		{"0s", 0, "0s"},
		{"0d", 0, "0s"},
		{"250ms", 250 * time.Millisecond, "250ms"},
		{"90s", 90 * time.Second, "1m30s"},
		{"10m", 10 * time.Minute, "10m"},
		{"1h30m", 90 * time.Minute, "1h30m"},
		{"1h5s", time.Hour + 5*time.Second, "1h0m5s"},
		{"36h", 36 * time.Hour, "36h"},
		{"72h", 72 * time.Hour, "3d"},
		{"30d", 720 * time.Hour, "30d"},
		{"106751d", 106751 * 24 * time.Hour, "106751d"},
	} {
		got, err := config.ParseDuration(tt.in)
		if err != nil || time.Duration(got) != tt.want || got.String() != tt.shown {
			t.Errorf("%s = %v, %v, shown as %s; want %v, shown as %s", tt.in, time.Duration(got), err, got, tt.want, tt.shown)
		}
	}
	for _, in := range []string{"", "d", "60", "-1s", "-1d", "1.5d", "+1d", "1d12h", "106752d", "99999999999999999999d", "3000000h", "1 h", "soon", "1w"} {
		if got, err := config.ParseDuration(in); err == nil {
			t.Errorf("%q is accepted as %s", in, got)
		}
	}
}

// A size is a number of bytes or a share, and is shown as one would write it.
func TestSizes(t *testing.T) {
	for _, tt := range []struct {
		in    string
		want  config.Size
		shown string
	}{
		{"0", config.Size{}, "0"},
		{"4096", config.Size{Bytes: 4096}, "4KiB"},
		{"1B", config.Size{Bytes: 1}, "1"},
		{"10GiB", config.Size{Bytes: 10 << 30}, "10GiB"},
		{"10 GiB", config.Size{Bytes: 10 << 30}, "10GiB"},
		{"10G", config.Size{Bytes: 10 << 30}, "10GiB"},
		{"1.5TiB", config.Size{Bytes: 1536 << 30}, "1536GiB"},
		{"500MB", config.Size{Bytes: 500e6}, "500000000"}, // not a whole number of KiB
		{"2kB", config.Size{Bytes: 2000}, "2000"},
		{"80%", config.Size{Percent: 80}, "80%"},
		{"12.5 %", config.Size{Percent: 12.5}, "12.5%"},
		{"100%", config.Size{Percent: 100}, "100%"},
	} {
		got, err := config.ParseSize(tt.in)
		if err != nil || got != tt.want || got.String() != tt.shown {
			t.Errorf("%s = %#v, %v, shown as %s; want %#v, shown as %s", tt.in, got, err, got, tt.want, tt.shown)
		}
	}
	for _, in := range []string{"", "%", "B", "GiB", "-1", "-1%", "0%", "100.1%", "101%", "NaN", "NaN%", "Inf", "1e30", "9EiB", "10gib", "10 apples", "1,5GiB", "9223372036854775807TiB"} {
		if got, err := config.ParseSize(in); err == nil {
			t.Errorf("%q is accepted as %s", in, got)
		}
	}
	if got := (config.Size{Percent: 12.5}).Of(1000); got != 125 {
		t.Errorf("12.5%% of 1000 bytes = %d, want 125", got)
	}
	if got := (config.Size{Bytes: 42}).Of(10); got != 42 {
		t.Errorf("42 bytes of 10 = %d, want 42", got)
	}
}

// What is shown reads back as the same value.
func TestValuesSurviveBeingShown(t *testing.T) {
	durations := func(n uint64, unit uint8) bool {
		d := config.Duration(n & math.MaxInt64)
		if u := []time.Duration{1, time.Second, time.Minute, time.Hour, 24 * time.Hour}[unit%5]; u > 1 {
			d -= d % config.Duration(u)
		}
		got, err := config.ParseDuration(d.String())
		return err == nil && got == d
	}
	sizes := func(n uint32, shift uint8) bool {
		z := config.Size{Bytes: int64(n) << (shift % 31)}
		got, err := config.ParseSize(z.String())
		return err == nil && got == z
	}
	shares := func(n uint16) bool {
		z := config.Size{Percent: 100 * (float64(n) + 1) / (1 << 16)}
		got, err := config.ParseSize(z.String())
		return err == nil && got == z
	}
	for _, f := range []any{durations, sizes, shares} {
		if err := quick.Check(f, &quick.Config{MaxCount: 5000}); err != nil {
			t.Error(err)
		}
	}
}
