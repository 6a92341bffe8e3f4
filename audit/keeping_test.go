package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/sqlite"
)

// Who resolved a tag and who fetched its digest is joined for each client: a
// HEAD of the tag and a GET of the digest are one pull of the tag; and it is
// written down in batches, also when the first attempt fails, and forgotten in
// the end.
func TestExposures(t *testing.T) {
	store, clk := openStore(t, t.TempDir()), newClock()
	flaky := &flakyExposures{store, errors.New("disk full")}
	x := audit.NewExposures(flaky, 30*24*hour, clk.Now, quiet)
	d := audittest.Digest("a")
	visit := func(client, tag string, fetched bool) {
		x.Note(audit.Visit{Digest: d, Client: client, Upstream: "docker.io", Repository: "library/app", Tag: tag, Fetched: fetched})
		clk.advance(time.Minute)
	}
	visit("10.0.0.1", "1", false) // Docker: HEAD the tag
	visit("10.0.0.1", "", true)   // and GET the digest
	visit("10.0.0.2", "", true)   // somebody who has it pinned
	x.Flush(t.Context())
	flaky.err = nil
	visit("10.0.0.1", "1", true)
	clk.advance(time.Hour)
	visit("10.0.0.1", "", true) // too late to belong to the tag
	x.Flush(t.Context())
	got, err := store.Exposures(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, e := range got {
		lines = append(lines, fmt.Sprintf("%s %s %d %d %v-%v", e.Client, e.Ref, e.Resolves, e.Fetches, e.First.Sub(noon), e.Last.Sub(noon)))
	}
	want := []string{
		"10.0.0.1 docker.io/library/app 0 1 1h4m0s-1h4m0s",
		"10.0.0.1 docker.io/library/app:1 2 2 0s-3m0s",
		"10.0.0.2 docker.io/library/app 0 1 2m0s-2m0s",
	}
	if fmt.Sprint(lines) != fmt.Sprint(want) {
		t.Errorf("exposures are\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	if n := len(audittest.Check(t, store)); n != 0 {
		t.Errorf("%d events: who pulled what is no entry of the log", n)
	}
	clk.advance(30*24*hour - 2*time.Minute)
	x.Forget(t.Context())
	if got, err := store.Exposures(t.Context(), d); err != nil || len(got) != 1 {
		t.Errorf("a month later: %+v, %v; want the last one only", got, err)
	}
}

type flakyExposures struct {
	*sqlite.Store
	err error
}

func (f *flakyExposures) AddExposures(ctx context.Context, batch []audit.Exposure) error {
	if f.err != nil {
		return f.err
	}
	return f.Store.AddExposures(ctx, batch)
}

// A trouble is an error of an upstream.
type trouble string

func (t trouble) Error() string     { return "upstream: " + string(t) }
func (t trouble) Condition() string { return string(t) }

// An upstream is in trouble after three failures in a row, of one kind, until it
// answers; each such time is written down with its end.
func TestConditions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := openStore(t, t.TempDir())
		c := audit.NewConditions(audit.ConditionOptions{Store: store, Log: quiet})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()
		say := func(errs ...error) {
			for _, err := range errs {
				c.Answered("docker.io", err)
				time.Sleep(time.Second)
			}
			synctest.Wait()
		}
		bad, lost := trouble(audit.Degraded), trouble(audit.AccessLost)
		say(bad, bad, nil, lost, bad, bad, fs.ErrClosed)
		if now := c.Now(); len(now) != 0 {
			t.Errorf("in trouble already: %+v", now)
		}
		say(bad, bad)
		if now := c.Now()["docker.io"]; now.Type != audit.Degraded {
			t.Errorf("after three in a row: %+v", now)
		}
		say(trouble(""))
		if now := c.Now(); len(now) != 0 {
			t.Errorf("a 404 is an answer, and still: %+v", now)
		}
		say(lost, lost, lost)
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		got, err := store.Conditions(t.Context(), 10)
		if err != nil || len(got) != 2 || got[0].Type != audit.AccessLost || got[0].Until != nil || got[1].Type != audit.Degraded || got[1].Until == nil || got[1].Cause != bad.Error() {
			t.Errorf("written down: %+v, %v", got, err)
		}
	})
}

// A trouble that a process before left open is told as over when it is, and not told again
// while it lasts.
func TestConditionsOverARestart(t *testing.T) {
	var told []string
	notify := func(e audit.Event) []audit.Recipient {
		told = append(told, string(e.Type))
		return nil
	}
	store := openStore(t, t.TempDir())
	open := []audit.Condition{{Upstream: "docker.io", Type: audit.Degraded, Since: noon}, {Upstream: "ghcr.io", Type: audit.Degraded, Since: noon, Until: &noon}}
	c := audit.NewConditions(audit.ConditionOptions{Store: store, Notify: notify, Open: open, Log: quiet})
	for range 4 {
		c.Answered("docker.io", trouble(audit.Degraded))
	}
	if len(c.Now()) != 1 || len(told) != 0 {
		t.Errorf("it lasts: %v, told %v", c.Now(), told)
	}
	c.Answered("docker.io", nil)
	if len(c.Now()) != 0 || len(told) != 1 || told[0] != audit.Recovered {
		t.Errorf("it is over: %v, told %v", c.Now(), told)
	}
}

// A flakyConditions is a store whose writes fail, or are done and reported as
// failed.
type flakyConditions struct {
	*sqlite.Store
	done bool

	mu   sync.Mutex
	err  error
	puts int
}

func (f *flakyConditions) PutCondition(ctx context.Context, c audit.Condition, told audit.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.puts++; f.err != nil && !f.done {
		return f.err
	}
	return errors.Join(f.Store.PutCondition(ctx, c, told), f.err)
}

// What cannot be written down about an upstream waits, in order, and is written
// once, whichever way the first attempt failed.
func TestConditionsAreNotLost(t *testing.T) {
	for _, done := range []bool{false, true} {
		t.Run(fmt.Sprintf("done but reported as failed: %t", done), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := openStore(t, t.TempDir())
				f := &flakyConditions{Store: store, err: errors.New("disk full"), done: done}
				c := audit.NewConditions(audit.ConditionOptions{Store: f, Log: quiet})
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error)
				go func() { ended <- c.Run(ctx) }()
				for _, err := range []error{trouble(audit.Degraded), trouble(audit.Degraded), trouble(audit.Degraded), nil} {
					c.Answered("docker.io", err)
					time.Sleep(time.Second)
				}
				synctest.Wait()
				f.mu.Lock()
				if f.puts == 0 {
					t.Error("nothing was tried")
				}
				f.err = nil
				f.mu.Unlock()
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				got, err := store.Conditions(t.Context(), 10)
				if err != nil || len(got) != 1 || got[0].Type != audit.Degraded || got[0].Until == nil || !got[0].Until.After(got[0].Since) {
					t.Errorf("written down: %+v, %v", got, err)
				}
				cancel()
				if err := <-ended; err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

// Once a day the ledger commits to what every tag means: the listing is kept as
// content, and its digest is an entry of the log.
func TestSnapshots(t *testing.T) {
	store, clk := openStore(t, t.TempDir()), newClock()
	l := audit.New(audit.Options{Store: store, Memory: store, Now: clk.Now})
	var listing []byte
	s := audit.NewSnapshots(l, store, store, func(_ context.Context, b []byte) (digest.Digest, error) {
		listing = bytes.Clone(b)
		return digest.FromBytes(b), nil
	}, quiet)
	look := func(want int) {
		t.Helper()
		if err := s.Look(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := len(audittest.Check(t, store)); n != want {
			t.Errorf("%d events, want %d", n, want)
		}
	}
	look(0)
	u := &upstream{says: "a"}
	resolve(t, l, u)
	if err := store.AddExposures(t.Context(), []audit.Exposure{{Digest: audittest.Digest("a"), Client: "10.0.0.1", Ref: "x"}}); err != nil {
		t.Fatal(err)
	}
	clk.advance(23 * hour)
	look(1)
	clk.advance(2 * hour)
	look(2)
	look(2)
	e := audittest.Check(t, store)[1]
	if e.Type != audit.Snapshot || e.Snapshot.Refs != 1 || e.Snapshot.Digest != digest.FromBytes(listing) || e.Snapshot.Size != int64(len(listing)) || e.Snapshot.Exposures == "" {
		t.Errorf("the snapshot is %+v", e.Snapshot)
	}
	if strings.Contains(string(mustLeaf(t, e)), "10.0.0.1") {
		t.Error("the leaf has the address of a client")
	}
	var line struct{ Ref, Head, Served string }
	if err := json.Unmarshal(listing, &line); err != nil || line.Ref != audittest.Ref("1").String() || line.Head != audittest.Digest("a").String() {
		t.Errorf("the listing is %s, %v", listing, err)
	}
}

func mustLeaf(t *testing.T, e audit.Event) []byte {
	t.Helper()
	leaf, err := e.Leaf()
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// A policy that is tried out on recorded history holds what it would have held,
// for as long, and says by which event; what was decided then has no say.
func TestReplay(t *testing.T) {
	store := openStore(t, t.TempDir())
	move := func(tag, name string, h float64) {
		if _, err := audittest.Move(t.Context(), store, audittest.Ref(tag), name, noon.Add(time.Duration(h*float64(hour)))); err != nil {
			t.Fatal(err)
		}
	}
	move("weekly", "w1", 0)
	move("kics", "good", 0)
	move("weekly", "w2", 168)
	move("kics", "bad", 200)
	move("kics", "good", 200.5)
	move("weekly", "w3", 336)
	entries := func(yield func(audit.Entry, error) bool) {
		all, err := store.Events(t.Context(), audit.EventQuery{})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			if !yield(e, nil) {
				return
			}
		}
	}
	for _, tt := range []struct {
		rule  audit.RuleText
		since float64
		want  []string
	}{
		{audit.RuleText{Mode: audit.Observe}, 0, nil},
		{audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour}, 0, []string{"weekly 2 168h0m0s 72h0m0s", "kics 3 200h0m0s 30m0s", "weekly 5 336h0m0s still"}},
		{audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour}, 300, []string{"weekly 5 336h0m0s still"}},
		{audit.RuleText{Mode: audit.HoldMode}, 0, []string{"weekly 2 168h0m0s 168h0m0s", "kics 3 200h0m0s 30m0s", "weekly 5 336h0m0s still"}},
	} {
		held, err := audit.Replay(compile(t, tt.rule), iter.Seq2[audit.Entry, error](entries), noon.Add(time.Duration(tt.since*float64(hour))), noon.Add(400*hour))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, h := range held {
			how := "still"
			if h.Until != nil {
				how = h.Until.Sub(h.Since).String()
			}
			got = append(got, fmt.Sprintf("%s %d %v %s", h.Ref.Tag, h.Index, h.Since.Sub(noon), how))
		}
		if fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s since %v: %q, want %q", tt.rule.Mode, tt.since, got, tt.want)
		}
	}
}

// A log that was rolled back goes on under a new name when an operator says so,
// with an entry that tells; one that is well does not. A crash in the middle is
// mended by calling it again.
func TestFork(t *testing.T) {
	dir := t.TempDir()
	store, key := openStore(t, dir), openKey(t, dir)
	anchor := filepath.Join(dir, "anchor")
	for i := range 5 {
		move(t, store, i)
	}
	run(t, audit.NewSigner(store, key, anchor, nil, quiet))()
	if _, err := audit.Fork(t.Context(), dir, store, "why not", false, noon); !errors.Is(err, audit.ErrNoFork) {
		t.Errorf("a log that is well: %v, want ErrNoFork", err)
	}
	whole := t.TempDir() // restored with its anchor: only who did it knows
	for _, name := range []string{"log.key", "log.vkey", "anchor"} {
		copyFile(t, filepath.Join(dir, name), filepath.Join(whole, name))
	}
	restored := openStore(t, whole)
	for i := range 5 {
		move(t, restored, i)
	}
	if origin, err := audit.Fork(t.Context(), whole, restored, "all of it is from the backup", true, noon); err != nil || origin == key.Origin() {
		t.Errorf("fork of a log that looks well: %q, %v", origin, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "log.key.new")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a key was left behind: %v", err)
	}
	for _, crash := range []string{"none", "after the database", "between the files"} {
		t.Run("crash "+crash, func(t *testing.T) {
			older := t.TempDir()
			for _, name := range []string{"log.key", "log.vkey", "anchor"} {
				copyFile(t, filepath.Join(dir, name), filepath.Join(older, name))
			}
			store := openStore(t, older) // a backup of before
			for i := range 3 {
				move(t, store, i)
			}
			path := func(name string) string { return filepath.Join(older, name) }
			log := audit.Forker(store)
			switch crash {
			case "after the database":
				log = &crashing{store}
			case "between the files":
				if err := os.Mkdir(path("log.vkey.tidemark.test_log"), 0o755); err != nil { // rename onto it fails
					t.Fatal(err)
				}
			}
			if crash != "none" {
				if _, err := audit.Fork(t.Context(), older, log, "restored a backup", false, noon); err == nil {
					t.Fatal("the crash did not happen")
				}
				if err := os.Remove(path("log.vkey.tidemark.test_log")); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Fatal(err)
				}
			}
			origin, err := audit.Fork(t.Context(), older, store, "restored a backup", false, noon)
			if err != nil || origin == "tidemark.test/log" {
				t.Fatalf("fork as %q, %v", origin, err)
			}
			next, err := audit.OpenKey(older, origin, false)
			if err != nil {
				t.Fatal(err)
			}
			s := audit.NewSigner(store, next, path("anchor"), nil, quiet)
			run(t, s)()
			events := audittest.Check(t, store)
			f := events[len(events)-1]
			if s.Err() != nil || s.Last().Tree.N != 4 || len(events) != 4 || f.Type != audit.Forked || f.Reason != "restored a backup" ||
				f.Fork.OldOrigin != "tidemark.test/log" || f.Fork.NewOrigin != origin || f.Fork.OldSize != 5 || f.Fork.Size != 3 {
				t.Errorf("signed %d, %v; the last event is %+v %+v", s.Last().Tree.N, s.Err(), f, f.Fork)
			}
			for _, name := range []string{"log.key.tidemark.test_log", "log.vkey.tidemark.test_log", "anchor.tidemark.test_log"} {
				if _, err := os.Stat(path(name)); err != nil {
					t.Errorf("the old file is gone: %v", err)
				}
			}
			r, err := audit.Verify(t.Context(), storeTiles(store), s.Last().Note, nil, next.Verifier)
			if err != nil || len(r.Problems) > 0 || r.Origin != origin {
				t.Errorf("verified as %+v, %v", r, err)
			}
		})
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A crashing log is done with the database when the process dies.
type crashing struct{ *sqlite.Store }

func (c *crashing) Fork(ctx context.Context, origin string, e audit.Event) (int64, error) {
	if _, err := c.Store.Fork(ctx, origin, e); err != nil {
		return 0, err
	}
	return 0, errors.New("killed")
}
