package audit_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/sqlite"
)

func openStore(t *testing.T, dir string) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Open(context.Background(), filepath.Join(dir, "audit.db"), "tidemark.test/log")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// An upstream answers what it is told, and counts.
type upstream struct {
	mu    sync.Mutex
	says  string
	err   error
	asked atomic.Int64
}

func (u *upstream) set(says string, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.says, u.err = says, err
}

func (u *upstream) ask(context.Context, audit.Question) (audit.Observation, error) {
	u.asked.Add(1)
	u.mu.Lock()
	defer u.mu.Unlock()
	return audit.Observation{Digest: audittest.Digest(u.says)}, u.err
}

func resolve(t *testing.T, l *audit.Ledger, u *upstream) audit.Answer {
	t.Helper()
	a, err := l.Resolve(t.Context(), audittest.Ref("1"), u.ask)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A clock is time that a test moves.
type clock struct{ now atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.now.Store(noon.UnixNano())
	return c
}

func (c *clock) Now() time.Time          { return time.Unix(0, c.now.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.now.Add(int64(d)) }

// Within the TTL an answer costs no question; after it upstream is asked once,
// and a move is in the ledger when the answer is given.
func TestAnswerIsGoodForItsTTLAndAMoveIsRecordedFirst(t *testing.T) {
	clk, u, store := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
	recorded := 0
	l := audit.New(audit.Options{Store: store, TTL: time.Minute, Now: clk.Now, Recorded: func(index int64, e audit.Event) {
		if got := len(audittest.Check(t, store)); int64(got) != index+1 {
			t.Errorf("told of event %d, the ledger has %d", index, got)
		}
		recorded++
	}})
	for range 3 {
		if a := resolve(t, l, u); a.Served != audittest.Digest("a") {
			t.Errorf("served %s", a.Served)
		}
	}
	u.set("b", nil)
	clk.advance(59 * time.Second)
	if a := resolve(t, l, u); a.Served != audittest.Digest("a") || a.Asked {
		t.Errorf("within the TTL: %+v", a)
	}
	clk.advance(2 * time.Second)
	if a := resolve(t, l, u); a.Served != audittest.Digest("b") || !a.Asked || !a.New || a.Index != 1 {
		t.Errorf("after the TTL: %+v", a)
	}
	if n := u.asked.Load(); n != 2 || recorded != 2 {
		t.Errorf("upstream was asked %d times and %d events recorded, want 2 and 2", n, recorded)
	}
}

// With a TTL of zero every pull asks, but those who wait at the same time share
// one question; and it is asked to its end when the one who caused it leaves.
func TestThoseWhoWaitShareOneQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := openStore(t, t.TempDir())
		l := audit.New(audit.Options{Store: store})
		var asked atomic.Int64
		release := make(chan struct{})
		ask := func(ctx context.Context, _ audit.Question) (audit.Observation, error) {
			asked.Add(1)
			select {
			case <-release:
			case <-ctx.Done():
				return audit.Observation{}, ctx.Err()
			}
			return audit.Observation{Digest: audittest.Digest("a")}, nil
		}
		first, leave := context.WithCancel(t.Context())
		gone := make(chan error)
		go func() {
			_, err := l.Resolve(first, audittest.Ref("1"), ask)
			gone <- err
		}()
		synctest.Wait()
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				if a, err := l.Resolve(t.Context(), audittest.Ref("1"), ask); err != nil || a.Served != audittest.Digest("a") {
					t.Errorf("%+v, %v", a, err)
				}
			})
		}
		synctest.Wait()
		leave()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("who left got %v", err)
		}
		close(release)
		wg.Wait()
		if asked.Load() != 1 {
			t.Errorf("upstream was asked %d times, want once", asked.Load())
		}
	})
}

// When upstream does not answer, a tag that is known keeps its last digest and
// says why; one that is not known is an error. After a restart too.
func TestUpstreamsTroubleIsNotOurs(t *testing.T) {
	dir, clk := t.TempDir(), newClock()
	down := errors.New("connection refused")
	u := &upstream{says: "a"}
	l := audit.New(audit.Options{Store: openStore(t, dir), Now: clk.Now})
	resolve(t, l, u)
	u.set("", down)
	for _, l := range []*audit.Ledger{l, audit.New(audit.Options{Store: openStore(t, dir), Now: clk.Now})} {
		if a := resolve(t, l, u); a.Served != audittest.Digest("a") || !errors.Is(a.Stale, down) {
			t.Errorf("answer is %+v, want the last digest and the reason", a)
		}
		if _, err := l.Resolve(t.Context(), audittest.Ref("unknown"), u.ask); !errors.Is(err, down) {
			t.Errorf("unknown tag: %v, want upstream's error", err)
		}
	}
	u.set("b", nil)
	if a := resolve(t, l, u); a.Served != audittest.Digest("b") || a.Stale != nil {
		t.Errorf("back again: %+v", a)
	}
}

// A faulty store fails when it is told to.
type faulty struct {
	audit.Store
	advance func(do func() (audit.State, error)) (audit.State, error)
}

func (f *faulty) Advance(ctx context.Context, ref audit.Ref, next func(audit.Record) (audit.State, []audit.Event, error)) (audit.State, error) {
	do := func() (audit.State, error) { return f.Store.Advance(ctx, ref, next) }
	if f.advance != nil {
		return f.advance(do)
	}
	return do()
}

// A move that cannot be recorded is not served: a known tag keeps its recorded
// digest, a new one is refused. When the write was done and reported as failed,
// what is served next is what is recorded, once.
func TestWhatCannotBeRecordedIsNotServed(t *testing.T) {
	full := errors.New("disk full")
	for name, advance := range map[string]func(do func() (audit.State, error)) (audit.State, error){
		"refused": func(func() (audit.State, error)) (audit.State, error) { return audit.State{}, full },
		"done but reported as failed": func(do func() (audit.State, error)) (audit.State, error) {
			_, err := do()
			return audit.State{}, errors.Join(err, full)
		},
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t, t.TempDir())
			f := &faulty{Store: store}
			l := audit.New(audit.Options{Store: f, Now: newClock().Now})
			u := &upstream{says: "a"}
			resolve(t, l, u)
			f.advance = advance
			u.set("b", nil)
			a := resolve(t, l, u)
			if a.Served != audittest.Digest("a") || !errors.Is(a.Stale, audit.ErrLedger) {
				t.Errorf("answer is %+v, want the recorded digest and ErrLedger", a)
			}
			if !errors.Is(l.Unwritable(), full) {
				t.Errorf("Unwritable = %v", l.Unwritable())
			}
			if _, err := l.Resolve(t.Context(), audittest.Ref("new"), u.ask); !errors.Is(err, audit.ErrLedger) {
				t.Errorf("a new tag: %v, want ErrLedger", err)
			}
			f.advance = nil
			for range 2 {
				if a := resolve(t, l, u); a.Served != audittest.Digest("b") || a.Stale != nil {
					t.Errorf("afterwards: %+v", a)
				}
			}
			if _, err := l.Resolve(t.Context(), audittest.Ref("new"), u.ask); err != nil {
				t.Errorf("the new tag afterwards: %v", err)
			}
			if events := audittest.Check(t, store); len(events) != 3 {
				t.Errorf("%d events, want the first sighting of two tags and one move", len(events))
			}
			if name == "refused" && l.Unwritable() != nil {
				t.Errorf("still said to be unwritable: %v", l.Unwritable())
			}
		})
	}
}

// With refresh in the background a known tag is answered at once, and what
// upstream then says is served from the next answer on.
func TestBackgroundRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := audit.New(audit.Options{Store: openStore(t, t.TempDir()), Background: true})
		u := &upstream{says: "a"}
		resolve(t, l, u)
		u.set("b", nil)
		if a := resolve(t, l, u); a.Served != audittest.Digest("a") {
			t.Errorf("served %s at once, want what is known", a.Served)
		}
		synctest.Wait()
		if a := resolve(t, l, u); a.Served != audittest.Digest("b") {
			t.Errorf("served %s afterwards, want what upstream said", a.Served)
		}
		synctest.Wait()
		down := errors.New("connection refused")
		u.set("", down)
		resolve(t, l, u)
		synctest.Wait()
		if a := resolve(t, l, u); a.Served != audittest.Digest("b") || !errors.Is(a.Stale, down) {
			t.Errorf("upstream is down: %+v, want what is known and the reason", a)
		}
		synctest.Wait()
	})
}

// Confirmations reach the store, also the last ones before the end, so that the
// next process gives honest intervals.
func TestConfirmationsAreRecorded(t *testing.T) {
	dir, clk := t.TempDir(), newClock()
	u := &upstream{says: "a"}
	l := audit.New(audit.Options{Store: openStore(t, dir), Now: clk.Now})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- l.Run(ctx) }()
	resolve(t, l, u)
	clk.advance(time.Hour)
	resolve(t, l, u)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	store := openStore(t, dir)
	st, err := store.State(t.Context(), audittest.Ref("1"))
	if err != nil || !st.LastConfirmed.Equal(noon.Add(time.Hour)) {
		t.Errorf("last confirmed %v, %v; want %v", st.LastConfirmed, err, noon.Add(time.Hour))
	}
}

// An answer within the TTL touches no store. (-benchmem shows its cost.)
func BenchmarkResolveWithinTTL(b *testing.B) {
	store, err := sqlite.Open(b.Context(), filepath.Join(b.TempDir(), "audit.db"), "tidemark.test/log")
	if err != nil {
		b.Fatal(err)
	}
	l := audit.New(audit.Options{Store: store, TTL: time.Hour})
	ask := func(context.Context, audit.Question) (audit.Observation, error) {
		return audit.Observation{Digest: digest.FromString("a")}, nil
	}
	if _, err := l.Resolve(b.Context(), audittest.Ref("1"), ask); err != nil {
		b.Fatal(err)
	}
	if err := store.Close(); err != nil { // from here on it cannot be touched
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := l.Resolve(b.Context(), audittest.Ref("1"), ask); err != nil {
			b.Fatal(err)
		}
	}
}
