package front

import (
	"os"
	"slices"
	"time"
)

// A follower reads files again when they have changed. Its owner has a mutex for it
// and for what read makes of them.
type follower struct {
	paths []string
	read  func() error // keeps what was read before if it fails

	stamp  []time.Time // modification times of what was read
	looked time.Time
}

// fileCheck is how often files that may change are looked at.
const fileCheck = time.Second

// load reads the files.
func (f *follower) load() error {
	stamp, err := f.stat()
	if err != nil {
		return err
	}
	if err := f.read(); err != nil {
		return err
	}
	f.stamp = stamp
	return nil
}

// follow reads the files again if they have changed. While that fails, what was read
// before counts, and the error says why.
func (f *follower) follow() error {
	now := time.Now()
	if now.Sub(f.looked) < fileCheck {
		return nil
	}
	f.looked = now
	stamp, err := f.stat()
	if err != nil || slices.EqualFunc(stamp, f.stamp, time.Time.Equal) {
		return err
	}
	return f.load()
}

func (f *follower) stat() ([]time.Time, error) {
	var stamp []time.Time
	for _, path := range f.paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		stamp = append(stamp, info.ModTime())
	}
	return stamp, nil
}
