package audit_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/sqlite"
	"tidemark/audit/taglog"
)

var quiet = zerolog.New(io.Discard)

func openKey(t *testing.T, dir string) *audit.Key {
	t.Helper()
	_, err := os.Stat(filepath.Join(dir, "log.key"))
	k, err := audit.OpenKey(dir, "tidemark.test/log", errors.Is(err, fs.ErrNotExist))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func move(t *testing.T, s *sqlite.Store, n int) {
	t.Helper()
	if _, err := audittest.Move(t.Context(), s, audittest.Ref("1"), fmt.Sprint(n), noon.Add(time.Duration(n)*time.Hour)); err != nil {
		t.Fatal(err)
	}
}

// run runs a signer until the returned function is called.
func run(t *testing.T, s *audit.Signer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// What grows is signed soon, at most once a second; what does not is signed once
// a day; the anchor and the database have the same; the key is only for us.
func TestLogIsSignedSoonAndAtLeastDaily(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		store, key := openStore(t, dir), openKey(t, dir)
		s := audit.NewSigner(store, key, filepath.Join(dir, "anchor"), nil, quiet)
		stop := run(t, s)
		defer stop()
		time.Sleep(2 * time.Second)
		move(t, store, 0)
		s.Grown()
		synctest.Wait()
		if n := s.Last().Tree.N; n != 1 || !s.UnsignedSince().IsZero() {
			t.Errorf("%d entries are signed, unsigned since %v; want 1 at once", n, s.UnsignedSince())
		}
		move(t, store, 1)
		s.Grown()
		synctest.Wait()
		if n := s.Last().Tree.N; n != 1 || s.UnsignedSince().IsZero() {
			t.Errorf("%d entries are signed within the second, want still 1", n)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := s.Last().Tree.N; n != 2 {
			t.Errorf("%d entries are signed after the second, want 2", n)
		}
		at := s.Last().At
		time.Sleep(25 * time.Hour)
		synctest.Wait()
		if again := s.Last().At; again.Sub(at) < 24*time.Hour {
			t.Errorf("signed again %v later, want once a day", again.Sub(at))
		}
		anchor, err := os.ReadFile(filepath.Join(dir, "anchor"))
		if err != nil || string(anchor) != string(s.Last().Note) {
			t.Errorf("the anchor is %q, %v", anchor, err)
		}
		c, err := taglog.Open(anchor, key.Verifier)
		if err != nil || c.N != 2 || c.Origin != "tidemark.test/log" {
			t.Errorf("checkpoint is %+v, %v", c, err)
		}
		if info, err := os.Stat(filepath.Join(dir, "log.key")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("log.key has mode %v, %v", info.Mode(), err)
		}
	})
}

// What was published before is compared with the log: a log that does not contain
// it was taken back. What others signed says nothing.
func TestLogFollowsWhatWasPublished(t *testing.T) {
	store, key := openStore(t, t.TempDir()), openKey(t, t.TempDir())
	for i := range 3 {
		move(t, store, i)
	}
	other := openStore(t, t.TempDir())
	for i := range 4 {
		move(t, other, 100+i)
	}
	s := audit.NewSigner(store, key, filepath.Join(t.TempDir(), "anchor"), nil, quiet)
	for name, before := range map[string][]byte{"nothing": nil, "no checkpoint": []byte("hello"), "its own": sign(t, store, key), "another key's": sign(t, other, openKey(t, t.TempDir()))} {
		if err := s.Follows(t.Context(), before); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	longer := sign(t, other, key)
	for range 2 { // shorter than what was published, and as long again
		if err := s.Follows(t.Context(), longer); !errors.Is(err, audit.ErrRollback) || !strings.Contains(err.Error(), "checkpoint of 4 entries") {
			t.Errorf("another history: %v", err)
		}
		move(t, store, 3)
	}
}

// A database that is older than the anchor, or another one, is noticed at the
// start and is not signed; nor is one whose key is gone.
func TestRollbackIsNoticedAndNotSigned(t *testing.T) {
	build := func(dir string, n, first int) *sqlite.Store {
		store := openStore(t, dir)
		for i := range n {
			move(t, store, first+i)
		}
		return store
	}
	for _, tt := range []struct {
		name string
		then func(t *testing.T, dir string) (*sqlite.Store, *audit.Key) // the state of a later start
		want error
	}{
		{"the same", func(t *testing.T, dir string) (*sqlite.Store, *audit.Key) {
			return openStore(t, dir), openKey(t, dir)
		}, nil},
		{"an older database", func(t *testing.T, dir string) (*sqlite.Store, *audit.Key) {
			return build(t.TempDir(), 3, 0), openKey(t, dir)
		}, audit.ErrRollback},
		{"another database of the same size", func(t *testing.T, dir string) (*sqlite.Store, *audit.Key) {
			return build(t.TempDir(), 5, 100), openKey(t, dir)
		}, audit.ErrRollback},
		{"an empty database", func(t *testing.T, dir string) (*sqlite.Store, *audit.Key) {
			return openStore(t, t.TempDir()), openKey(t, dir)
		}, audit.ErrRollback},
		{"another key", func(t *testing.T, dir string) (*sqlite.Store, *audit.Key) {
			return openStore(t, dir), openKey(t, t.TempDir())
		}, taglog.ErrSignature},
		{"no key", func(t *testing.T, dir string) (*sqlite.Store, *audit.Key) {
			return openStore(t, dir), nil
		}, audit.ErrNoKey},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			anchor := filepath.Join(dir, "anchor")
			run(t, audit.NewSigner(build(dir, 5, 0), openKey(t, dir), anchor, nil, quiet))()
			before, err := os.ReadFile(anchor)
			if err != nil {
				t.Fatal(err)
			}
			store, key := tt.then(t, dir)
			s := audit.NewSigner(store, key, anchor, nil, quiet)
			run(t, s)()
			if !errors.Is(s.Err(), tt.want) || tt.want == nil && s.Err() != nil {
				t.Errorf("Err = %v, want %v", s.Err(), tt.want)
			}
			move(t, store, 1000) // nothing new is signed either
			s.Grown()
			run(t, s)()
			after, err := os.ReadFile(anchor)
			if err != nil || (string(after) == string(before)) != (tt.want != nil) {
				t.Errorf("the anchor changed: %t, want %t; %v", string(after) != string(before), tt.want == nil, err)
			}
		})
	}
}

// The key is made once, its verifier is derived again when it is lost, and a key
// that is broken, missing or of another log is told as such.
func TestKey(t *testing.T) {
	dir := t.TempDir()
	k := openKey(t, dir)
	if err := os.Remove(filepath.Join(dir, "log.vkey")); err != nil {
		t.Fatal(err)
	}
	if again := openKey(t, dir); again.VKey != k.VKey {
		t.Errorf("verifier is %s, was %s", again.VKey, k.VKey)
	}
	if vkey, err := os.ReadFile(filepath.Join(dir, "log.vkey")); err != nil || strings.TrimSpace(string(vkey)) != k.VKey {
		t.Errorf("log.vkey is %q, %v", vkey, err)
	}
	if _, err := audit.OpenKey(dir, "other.test/log", false); err == nil || !strings.Contains(err.Error(), "other.test/log") {
		t.Errorf("key of another log: %v", err)
	}
	if _, err := audit.OpenKey(t.TempDir(), "x", false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no key: %v, want fs.ErrNotExist", err)
	}
	for _, broken := range []string{"", "rubbish", "PRIVATE+KEY+a+b+c"} {
		if err := os.WriteFile(filepath.Join(dir, "log.key"), []byte(broken), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := audit.OpenKey(dir, "tidemark.test/log", true); err == nil {
			t.Errorf("the broken key %q was accepted", broken)
		}
	}
}

// A flaky log cannot be read or written for a while.
type flaky struct {
	*sqlite.Store
	broken atomic.Bool
}

func (f *flaky) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	if f.broken.Load() {
		return nil, errors.New("too many open files")
	}
	return f.Store.ReadHashes(indexes)
}

// A log that cannot be read for a moment is not one that was rolled back: it is
// signed when it can be read again, without anything new happening.
func TestTroubleReadingIsNotARollback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		store := openStore(t, dir)
		move(t, store, 0)
		log := &flaky{Store: store}
		log.broken.Store(true)
		s := audit.NewSigner(log, openKey(t, dir), filepath.Join(dir, "anchor"), nil, quiet)
		stop := run(t, s)
		defer stop()
		time.Sleep(5 * time.Second)
		if err := s.Err(); err == nil || errors.Is(err, audit.ErrRollback) || s.UnsignedSince().IsZero() {
			t.Errorf("Err = %v, unsigned since %v; want trouble that is no rollback", err, s.UnsignedSince())
		}
		log.broken.Store(false)
		time.Sleep(2 * time.Minute)
		if s.Err() != nil || s.Last().Tree.N != 1 || !s.UnsignedSince().IsZero() {
			t.Errorf("afterwards: %v, %d entries signed, unsigned since %v", s.Err(), s.Last().Tree.N, s.UnsignedSince())
		}
	})
}
