// Package cachetest holds what every cache.Store must do, as tests.
//
//	func TestStore(t *testing.T) {
//		cachetest.Run(t, func(t *testing.T, dir string) cache.Store { … })
//	}
package cachetest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
)

// Run tests the stores that open returns. Called twice with the same dir it
// stands for a process and the next one.
func Run(t *testing.T, open func(t *testing.T, dir string) cache.Store) {
	for name, test := range map[string]func(*testing.T, func() cache.Store){
		"absent content is fs.ErrNotExist":                absent,
		"content is visible only once committed":          visibleOnceCommitted,
		"readers follow the writer":                       readersFollow,
		"unfinished content outlives its process":         unfinishedSurvives,
		"discarded content leaves nothing":                discarded,
		"syncing makes nothing visible and loses nothing": synced,
		"uses are remembered":                             usesRemembered,
		"removed content stays readable where it is open": removedStaysReadable,
		"sha512 content is kept like sha256":              otherAlgorithm,
		"what is no digest is refused":                    noDigest,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			test(t, func() cache.Store { return open(t, dir) })
		})
	}
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func begin(t *testing.T, s cache.Store, dgst digest.Digest) cache.Partial {
	t.Helper()
	return must[cache.Partial](t)(s.Begin(dgst))
}

func put(t *testing.T, s cache.Store, body []byte) digest.Digest {
	t.Helper()
	dgst := digest.FromBytes(body)
	p := begin(t, s, dgst)
	must[int](t)(p.Write(body))
	check(t, p.Commit())
	return dgst
}

func read(t *testing.T, s cache.Store, dgst digest.Digest) []byte {
	t.Helper()
	f, e, err := s.Open(dgst)
	check(t, err)
	defer f.Close()
	b := must[[]byte](t)(io.ReadAll(f))
	if e.Digest != dgst || e.Size != int64(len(b)) {
		t.Errorf("Open tells of %s with %d bytes, want %s with %d", e.Digest, e.Size, dgst, len(b))
	}
	return b
}

func walk(t *testing.T, s cache.Store) (whole, partial []digest.Digest) {
	t.Helper()
	for e, err := range s.Walk(t.Context()) {
		check(t, err)
		if e.Partial {
			partial = append(partial, e.Digest)
		} else {
			whole = append(whole, e.Digest)
		}
	}
	slices.Sort(whole)
	return whole, partial
}

func absent(t *testing.T, open func() cache.Store) {
	s, dgst := open(), digest.FromString("absent")
	if _, _, err := s.Open(dgst); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open = %v, want fs.ErrNotExist", err)
	}
	check(t, s.Touch(dgst, time.Now()))
	check(t, s.Remove(cache.Entry{Digest: dgst}))
	check(t, s.Remove(cache.Entry{Digest: dgst, Partial: true}))
	if n := must[int64](t)(s.Free()); n <= 0 {
		t.Errorf("Free = %d", n)
	}
}

func visibleOnceCommitted(t *testing.T, open func() cache.Store) {
	s, body := open(), []byte("some content")
	dgst := digest.FromBytes(body)
	p := begin(t, s, dgst)
	must[int](t)(p.Write(body))
	if _, _, err := s.Open(dgst); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open before Commit = %v, want fs.ErrNotExist", err)
	}
	check(t, p.Commit())
	for _, s := range []cache.Store{s, open()} {
		if got := read(t, s, dgst); !bytes.Equal(got, body) {
			t.Errorf("read %q, want %q", got, body)
		}
		if whole, partial := walk(t, s); len(whole) != 1 || len(partial) != 0 {
			t.Errorf("Walk = %v and unfinished %v, want one and none", whole, partial)
		}
	}
}

func readersFollow(t *testing.T, open func() cache.Store) {
	s, dgst := open(), digest.FromString("onetwothree")
	p := begin(t, s, dgst)
	f := must[cache.File](t)(p.Open())
	defer f.Close()
	for _, part := range []string{"one", "two"} {
		must[int](t)(p.Write([]byte(part)))
		if got := must[[]byte](t)(io.ReadAll(f)); string(got) != part {
			t.Errorf("reader got %q, want %q", got, part)
		}
	}
	must[int](t)(p.Write([]byte("three")))
	check(t, p.Commit())
	late := must[cache.File](t)(p.Open()) // also after the end
	defer late.Close()
	if got := must[[]byte](t)(io.ReadAll(late)); string(got) != "onetwothree" {
		t.Errorf("late reader got %q", got)
	}
	if got := must[[]byte](t)(io.ReadAll(f)); string(got) != "three" {
		t.Errorf("reader got %q after Commit, want %q", got, "three")
	}
}

func unfinishedSurvives(t *testing.T, open func() cache.Store) {
	s, dgst := open(), digest.FromString("half and half")
	p := begin(t, s, dgst)
	must[int](t)(p.Write([]byte("half")))
	check(t, p.Keep())
	s = open()
	if whole, partial := walk(t, s); len(whole) != 0 || len(partial) != 1 || partial[0] != dgst {
		t.Fatalf("Walk = %v and unfinished %v, want none and %s", whole, partial, dgst)
	}
	p = begin(t, s, dgst)
	if p.Size() != 4 {
		t.Fatalf("Size = %d, want the 4 bytes that were kept", p.Size())
	}
	must[int](t)(p.Write([]byte(" and half")))
	check(t, p.Commit())
	if got := read(t, s, dgst); string(got) != "half and half" {
		t.Errorf("read %q", got)
	}
}

func discarded(t *testing.T, open func() cache.Store) {
	s, dgst := open(), digest.FromString("x")
	p := begin(t, s, dgst)
	must[int](t)(p.Write([]byte("wrong")))
	check(t, p.Reset())
	if p.Size() != 0 {
		t.Errorf("Size after Reset = %d", p.Size())
	}
	must[int](t)(p.Write([]byte("wrong again")))
	check(t, p.Discard())
	p = begin(t, s, dgst)
	if p.Size() != 0 {
		t.Errorf("Size after Discard = %d", p.Size())
	}
	check(t, p.Keep()) // of nothing is nothing
	if whole, partial := walk(t, s); len(whole)+len(partial) != 0 {
		t.Errorf("Walk = %v and unfinished %v, want nothing", whole, partial)
	}
}

func synced(t *testing.T, open func() cache.Store) {
	s, dgst := open(), digest.FromString("half and half")
	check(t, s.Sync()) // of nothing
	p := begin(t, s, dgst)
	must[int](t)(p.Write([]byte("half")))
	check(t, p.Sync())
	if _, _, err := s.Open(dgst); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of what was synced and not committed = %v, want fs.ErrNotExist", err)
	}
	must[int](t)(p.Write([]byte(" and half")))
	check(t, p.Sync())
	check(t, p.Keep())
	s = open()
	p = begin(t, s, dgst)
	if p.Size() != 13 {
		t.Errorf("Size = %d, want the 13 bytes that were synced", p.Size())
	}
	check(t, p.Commit())
	for range 2 {
		check(t, s.Sync())
		if got := read(t, s, dgst); string(got) != "half and half" {
			t.Errorf("read %q", got)
		}
	}
}

func usesRemembered(t *testing.T, open func() cache.Store) {
	s := open()
	used := time.Now().Add(-time.Hour).Truncate(time.Millisecond)
	dgst := put(t, s, []byte("used"))
	check(t, s.Touch(dgst, used))
	for e, err := range open().Walk(t.Context()) {
		check(t, err)
		if !e.Used.Equal(used) || e.Size != 4 {
			t.Errorf("Walk tells %v and %d bytes, want %v and 4", e.Used, e.Size, used)
		}
	}
}

func removedStaysReadable(t *testing.T, open func() cache.Store) {
	s := open()
	dgst := put(t, s, []byte("removed"))
	f, _, err := s.Open(dgst)
	check(t, err)
	defer f.Close()
	check(t, s.Remove(cache.Entry{Digest: dgst}))
	if got := must[[]byte](t)(io.ReadAll(f)); string(got) != "removed" {
		t.Errorf("read %q from what was open", got)
	}
	absent(t, open)
}

func otherAlgorithm(t *testing.T, open func() cache.Store) {
	s, body := open(), []byte("longer names")
	dgst := digest.SHA512.FromBytes(body)
	p := begin(t, s, dgst)
	must[int](t)(p.Write(body))
	check(t, p.Commit())
	put(t, s, body)
	if whole, _ := walk(t, open()); len(whole) != 2 {
		t.Errorf("Walk = %v, want both digests", whole)
	}
	if got := read(t, s, dgst); !bytes.Equal(got, body) {
		t.Errorf("read %q", got)
	}
}

func noDigest(t *testing.T, open func() cache.Store) {
	s := open()
	kept := put(t, s, []byte("kept"))
	for _, bad := range []digest.Digest{"", "garbage", "sha256:", "sha256:../../kept", "../../kept:x", "md5:d41d8cd98f00b204e9800998ecf8427e", kept[:20], kept + "/"} {
		if _, _, err := s.Open(bad); err == nil {
			t.Errorf("Open(%q) opened something", string(bad))
		}
		if _, err := s.Begin(bad); err == nil {
			t.Errorf("Begin(%q) began something", string(bad))
		}
		if s.Remove(cache.Entry{Digest: bad}) == nil || s.Touch(bad, time.Now()) == nil {
			t.Errorf("%q was touched or removed", string(bad))
		}
	}
	read(t, s, kept)
}
