package cache_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"

	"tidemark/cache"
	"tidemark/cache/disk"
)

// A source is an upstream of one piece of content that does what it is told.
type source struct {
	name   string
	body   []byte
	before func(ctx context.Context, open int) error // of each Open, from 1 on
	reader func(open int, r io.Reader) io.Reader     // stands between the body and who reads it
	noSize bool
	deaf   bool // ignores offsets

	mu    sync.Mutex
	opens []int64 // the offset of each Open
	sent  int64
}

func (s *source) Name() string { return s.name }

func (s *source) Open(ctx context.Context, off, n int64) (*cache.Content, error) {
	s.mu.Lock()
	s.opens = append(s.opens, off)
	open := len(s.opens)
	s.mu.Unlock()
	if s.before != nil {
		if err := s.before(ctx, open); err != nil {
			return nil, err
		}
	}
	if off > int64(len(s.body)) || off == int64(len(s.body)) && off > 0 {
		return nil, cache.ErrRange
	}
	if s.deaf {
		off = 0
	}
	end := int64(len(s.body))
	if n >= 0 {
		end = min(end, off+n)
	}
	var r io.Reader = bytes.NewReader(s.body[off:end])
	if s.reader != nil {
		r = s.reader(open, r)
	}
	size := int64(len(s.body))
	if s.noSize {
		size = -1
	}
	return &cache.Content{Body: io.NopCloser(&counted{s, ctx, r}), Offset: off, Size: size}, nil
}

func (s *source) opened() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.opens)
}

type counted struct {
	s   *source
	ctx context.Context
	r   io.Reader
}

func (c *counted) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.s.mu.Lock()
	c.s.sent += int64(n)
	c.s.mu.Unlock()
	return n, err
}

// cutAfter breaks a stream.
func cutAfter(n int64, r io.Reader) io.Reader {
	return io.MultiReader(io.LimitReader(r, n), broken{})
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("connection reset") }

func content(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	_, _ = r.Read(b)
	return b
}

type options struct {
	dir   string
	max   int64
	free  int64
	now   func() time.Time
	store func(cache.Store) cache.Store
	pins  func(context.Context) iter.Seq2[cache.Pin, error]
}

// start returns a cache on disk whose Run has found what is there.
func start(t *testing.T, o options) (*cache.Cache, string) {
	t.Helper()
	if o.dir == "" {
		o.dir = t.TempDir()
	}
	c, stop := startUnready(t, o)
	t.Cleanup(stop)
	for !c.Stats().Ready {
		time.Sleep(time.Millisecond)
	}
	return c, o.dir
}

// startUnready returns a cache that may not have found yet what is there.
func startUnready(t *testing.T, o options) (c *cache.Cache, stop func()) {
	t.Helper()
	if o.max == 0 {
		o.max = 1 << 30
	}
	d, err := disk.Open(o.dir)
	if err != nil {
		t.Fatal(err)
	}
	var store cache.Store = d
	if o.store != nil {
		store = o.store(store)
	}
	c = cache.New(cache.Options{
		Store: store, Budget: func(int64) int64 { return o.max }, MinFree: o.free, Now: o.now, Describe: describe, Pins: o.pins, Log: zerolog.New(io.Discard),
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Run(ctx)
	}()
	return c, func() { cancel(); <-done }
}

// describe reads the manifests of these tests: a JSON list of digests, and an index,
// which has such a list under images.
func describe(b []byte) (cache.Description, error) {
	var refs []digest.Digest
	var index struct{ Images []digest.Digest }
	var d cache.Description
	if json.Unmarshal(b, &index) == nil {
		refs, d.Index = index.Images, true
	} else if err := json.Unmarshal(b, &refs); err != nil {
		return cache.Description{}, err
	}
	for _, r := range refs {
		d.Refers = append(d.Refers, cache.Reference{Digest: r, Size: -1})
	}
	return d, nil
}

func get(ctx context.Context, c *cache.Cache, dgst digest.Digest, src cache.Source) ([]byte, cache.Outcome, error) {
	return getRange(ctx, c, dgst, src, 0, -1)
}

func getRange(ctx context.Context, c *cache.Cache, dgst digest.Digest, src cache.Source, off, n int64) ([]byte, cache.Outcome, error) {
	b, err := c.Get(ctx, dgst, src)
	if err != nil {
		return nil, 0, err
	}
	defer b.Close()
	s, err := b.Section(ctx, off, n)
	if err != nil {
		return nil, b.Outcome, err
	}
	var buf bytes.Buffer
	_, err = s.WriteTo(&buf)
	return buf.Bytes(), b.Outcome, err
}

// settled waits until no fill runs any more.
func settled(c *cache.Cache) {
	for len(c.Stats().Fills) > 0 {
		time.Sleep(time.Millisecond)
	}
}

// nothingWrong checks what must always hold: whatever stands under a name in
// the store hashes to it, and the index agrees with the disk.
func nothingWrong(t *testing.T, c *cache.Cache, dir string) {
	t.Helper()
	settled(c)
	var bytes, blobs int64
	files, err := os.ReadDir(filepath.Join(dir, "blobs/sha256"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, "blobs/sha256", f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if digest.FromBytes(b).Encoded() != f.Name() {
			t.Errorf("%s holds other content", f.Name())
		}
		bytes += int64(len(b))
		blobs++
	}
	if s := c.Stats(); s.Bytes != bytes || s.Blobs != blobs {
		t.Errorf("index has %d bytes in %d blobs, disk %d in %d", s.Bytes, s.Blobs, bytes, blobs)
	}
}

// However many ask for the same cold content, the source is opened once, and
// everybody gets all of it.
func TestManyReadersShareOneFill(t *testing.T) {
	c, dir := start(t, options{})
	body := content(3 << 20)
	dgst := digest.FromBytes(body)
	src := &source{body: body}
	var wg sync.WaitGroup
	outcomes := make([]cache.Outcome, 64)
	for i := range outcomes {
		wg.Go(func() {
			got, o, err := get(t.Context(), c, dgst, src)
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("reader %d got %d bytes, %v", i, len(got), err)
			}
			outcomes[i] = o
		})
	}
	wg.Wait()
	if src.opened() != 1 || src.sent != int64(len(body)) {
		t.Errorf("source was opened %d times and sent %d bytes, want once and %d", src.opened(), src.sent, len(body))
	}
	fills := 0
	for _, o := range outcomes {
		if o == cache.Fill {
			fills++
		}
	}
	if fills != 1 {
		t.Errorf("%d readers say they began the fill, want 1", fills)
	}
	nothingWrong(t, c, dir)
	if _, o, err := get(t.Context(), c, dgst, nil); o != cache.Hit || err != nil {
		t.Errorf("after the fill: %v, %v, want a hit", o, err)
	}
}

// Bytes reach every reader before the download ends, and the first reader
// hanging up does not disturb the others.
func TestFillStreamsAndSurvivesItsFirstReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, dir := start(t, options{})
		body := content(1 << 20)
		pr, pw := io.Pipe()
		src := &source{body: body, reader: func(_ int, r io.Reader) io.Reader { return pr }}
		ctx, hangUp := context.WithCancel(t.Context())
		first, err := c.Get(ctx, digest.FromBytes(body), src)
		if err != nil {
			t.Fatal(err)
		}
		second, err := c.Get(t.Context(), digest.FromBytes(body), src)
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		done := make(chan error)
		go func() {
			s, err := second.Section(t.Context(), 0, -1)
			if err == nil {
				_, err = s.WriteTo(&got)
			}
			done <- err
		}()
		_, _ = pw.Write(body[:len(body)/2])
		synctest.Wait()
		if got.Len() != len(body)/2 {
			t.Errorf("second reader has %d bytes while half has arrived, want %d", got.Len(), len(body)/2)
		}
		hangUp()
		first.Close()
		go func() { _, _ = pw.Write(body[len(body)/2:]); pw.Close() }()
		if err := <-done; err != nil || !bytes.Equal(got.Bytes(), body) {
			t.Errorf("second reader got %d bytes, %v; want all %d", got.Len(), err, len(body))
		}
		second.Close()
		if src.opened() != 1 {
			t.Errorf("source opened %d times, want 1", src.opened())
		}
		nothingWrong(t, c, dir)
	})
}

// However a download goes wrong, the client sees an error and never a complete
// body, nothing is stored, and the next request starts afresh.
func TestFillFailures(t *testing.T) {
	good := content(2<<20 + 17)
	last := bytes.Clone(good)
	last[len(last)-1] ^= 1
	first := bytes.Clone(good)
	first[0] ^= 1
	for _, tt := range []struct {
		name   string
		body   []byte
		noSize bool
	}{
		{"last byte differs", last, false},
		{"first byte differs", first, false},
		{"last byte differs, size not told", last, true},
		{"body is too long", append(bytes.Clone(good), 'x'), false},
		{"body is too long, size not told", append(bytes.Clone(good), 'x'), true},
		{"body is too short", good[:1000], false},
		{"body is too short, size not told", good[:1000], true},
		{"body is empty", nil, false},
		{"body is empty, size not told", nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, dir := start(t, options{})
			dgst := digest.FromBytes(good)
			got, _, err := get(t.Context(), c, dgst, &source{body: tt.body, noSize: tt.noSize})
			if !errors.Is(err, cache.ErrMismatch) {
				t.Errorf("error = %v, want ErrMismatch", err)
			}
			if len(got) >= len(tt.body) && len(tt.body) > 0 {
				t.Errorf("client got %d bytes of wrong content, all there was", len(got))
			}
			nothingWrong(t, c, dir)
			if left, _ := os.ReadDir(filepath.Join(dir, "partial")); len(left) != 0 {
				t.Errorf("wrong bytes were left behind: %v", left)
			}
			again, o, err := get(t.Context(), c, dgst, &source{body: good})
			if err != nil || o != cache.Fill || !bytes.Equal(again, good) {
				t.Errorf("afresh: %d bytes, %v, %v", len(again), o, err)
			}
		})
	}
}

// A source that has no answer is told as it is, and asked again by the next.
func TestSourceErrorIsEverybodys(t *testing.T) {
	c, _ := start(t, options{})
	body := content(1000)
	arrived := make(chan struct{})
	src := &source{name: "a", body: body, before: func(_ context.Context, open int) error {
		if open == 1 {
			<-arrived
			return fs.ErrNotExist
		}
		return nil
	}}
	errs := make(chan error)
	for range 8 {
		go func() {
			_, _, err := get(t.Context(), c, digest.FromBytes(body), src)
			errs <- err
		}()
	}
	for len(c.Stats().Fills) == 0 || c.Stats().Fills[0].Readers < 8 {
		time.Sleep(time.Millisecond)
	}
	close(arrived)
	for range 8 {
		if err := <-errs; !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("error = %v, want fs.ErrNotExist for everybody", err)
		}
	}
	if _, _, err := get(t.Context(), c, digest.FromBytes(body), src); err != nil || src.opened() != 2 {
		t.Errorf("next request: %v after %d opens, want success after 2", err, src.opened())
	}
}

// A reader that joined a fill from another source than its own is not refused
// by that source's word: its own is asked.
func TestJoinedFillOfAnotherSourceIsNotTheLastWord(t *testing.T) {
	c, _ := start(t, options{})
	body := content(1000)
	joined := make(chan struct{})
	private := &source{name: "private", before: func(context.Context, int) error { <-joined; return fs.ErrPermission }}
	public := &source{name: "public", body: body}
	first, second := make(chan error), make(chan error)
	go func() { _, _, err := get(t.Context(), c, digest.FromBytes(body), private); first <- err }()
	for len(c.Stats().Fills) == 0 {
		time.Sleep(time.Millisecond)
	}
	go func() { _, _, err := get(t.Context(), c, digest.FromBytes(body), public); second <- err }()
	for f := c.Stats().Fills; f[0].Readers < 2; f = c.Stats().Fills {
		time.Sleep(time.Millisecond)
	}
	close(joined)
	if err := <-first; !errors.Is(err, fs.ErrPermission) {
		t.Errorf("first: %v, want its source's refusal", err)
	}
	if err := <-second; err != nil {
		t.Errorf("second: %v, want the content from its own source", err)
	}
}

// A download that is cut is resumed where it stopped; the client does not
// notice, and no byte is fetched twice.
func TestCutIsResumed(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		t.Run(fmt.Sprintf("source ignores ranges %t", deaf), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, dir := start(t, options{})
				body := content(3 << 20)
				src := &source{body: body, deaf: deaf, reader: func(open int, r io.Reader) io.Reader {
					if open <= 2 {
						return cutAfter(int64(len(body)/2), r)
					}
					return r
				}}
				if deaf {
					src.reader = func(open int, r io.Reader) io.Reader {
						if open == 1 {
							return cutAfter(int64(len(body)/2), r)
						}
						return r
					}
				}
				got, _, err := get(t.Context(), c, digest.FromBytes(body), src)
				if err != nil || !bytes.Equal(got, body) {
					t.Errorf("client got %d bytes, %v", len(got), err)
				}
				if !deaf && src.sent != int64(len(body)) {
					t.Errorf("source sent %d bytes for %d", src.sent, len(body))
				}
				nothingWrong(t, c, dir)
			})
		})
	}
}

// A source that stays broken is given up after a while, not for ever.
func TestBrokenSourceIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, dir := start(t, options{})
		body := content(1 << 20)
		down := errors.New("connection refused")
		src := &source{body: body, reader: func(_ int, r io.Reader) io.Reader { return cutAfter(100_000, r) },
			before: func(_ context.Context, open int) error {
				if open > 1 {
					return down
				}
				return nil
			}}
		began := time.Now()
		got, _, err := get(t.Context(), c, digest.FromBytes(body), src)
		if !errors.Is(err, down) || len(got) != 100_000 {
			t.Errorf("client got %d bytes, %v; want 100000 and the source's error", len(got), err)
		}
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("given up after %v", took)
		}
		nothingWrong(t, c, dir)
	})
}

// What a process had got when it stopped is not fetched again by the next, and
// what it had got wrong does no harm.
func TestFillIsResumedByTheNextProcess(t *testing.T) {
	body := content(2 << 20)
	half := body[:len(body)/2]
	for _, tt := range []struct {
		name string
		left []byte
		sent int // bytes from the source
		ok   bool
	}{
		{"half", half, len(body) - len(half), true},
		{"all but the commit", body, 0, true},
		{"longer than the content", append(bytes.Clone(body), "more"...), len(body), true},
		{"corrupt", append([]byte{^body[0]}, half[1:]...), len(body) - len(half), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			d, err := disk.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			p, err := d.Begin(digest.FromBytes(body))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Write(tt.left); err != nil {
				t.Fatal(err)
			}
			if err := p.Keep(); err != nil {
				t.Fatal(err)
			}
			c, _ := start(t, options{dir: dir})
			src := &source{body: body}
			got, _, err := get(t.Context(), c, digest.FromBytes(body), src)
			if tt.ok != (err == nil && bytes.Equal(got, body)) {
				t.Errorf("client got %d bytes, %v", len(got), err)
			}
			if !tt.ok && !errors.Is(err, cache.ErrMismatch) {
				t.Errorf("error = %v, want ErrMismatch", err)
			}
			if src.sent != int64(tt.sent) {
				t.Errorf("source sent %d bytes, want %d", src.sent, tt.sent)
			}
			nothingWrong(t, c, dir)
			if again, _, err := get(t.Context(), c, digest.FromBytes(body), src); err != nil || !bytes.Equal(again, body) {
				t.Errorf("afterwards: %d bytes, %v", len(again), err)
			}
		})
	}
}

// A fill that everybody left goes on for the time of grace, is then given up,
// and what it has got is resumed by whoever comes later.
func TestAbandonedFillIsKeptForLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, dir := start(t, options{})
		body := content(1 << 20)
		dgst := digest.FromBytes(body)
		stopped := make(chan error, 1)
		src := &source{body: body, before: func(ctx context.Context, open int) error {
			if open == 1 {
				context.AfterFunc(ctx, func() { stopped <- context.Cause(ctx) })
			}
			return nil
		}}
		pr, pw := io.Pipe()
		src.reader = func(open int, r io.Reader) io.Reader {
			if open == 1 {
				return pr
			}
			return r
		}
		b, err := c.Get(t.Context(), dgst, src)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = pw.Write(body[:300_000])
		b.Close()
		time.Sleep(59 * time.Second)
		select {
		case err := <-stopped:
			t.Fatalf("stopped before the grace was over: %v", err)
		default:
		}
		time.Sleep(2 * time.Second)
		<-stopped
		pw.CloseWithError(errors.New("cancelled"))
		settled(c)
		got, _, err := get(t.Context(), c, dgst, src)
		if err != nil || !bytes.Equal(got, body) {
			t.Errorf("later: %d bytes, %v", len(got), err)
		}
		if src.opens[1] != 300_000 {
			t.Errorf("resumed at %d, want 300000", src.opens[1])
		}
		nothingWrong(t, c, dir)
	})
}

// The last bytes of content wait for its digest, in every kind of section.
func TestLastBytesWaitForTheDigest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := start(t, options{})
		body := content(40 << 20)
		bad := bytes.Clone(body)
		bad[5] ^= 1
		size := int64(len(body))
		release := make(chan struct{})
		src := &source{body: bad, reader: func(open int, r io.Reader) io.Reader {
			if open == 1 { // the fill: nothing beyond the first bytes until released
				return io.MultiReader(io.LimitReader(r, 100), waiting{release}, r)
			}
			return r
		}}
		dgst := digest.FromBytes(body)
		type result struct {
			got []byte
			o   cache.Outcome
			err error
		}
		ask := func(off, n int64) chan result {
			ch := make(chan result, 1)
			go func() {
				got, o, err := getRange(t.Context(), c, dgst, src, off, n)
				ch <- result{got, o, err}
			}()
			return ch
		}
		whole, tail := ask(0, -1), ask(size-10, 10)
		synctest.Wait()
		far := <-ask(size-1000, 500) // is not made to wait for 40 MiB
		if far.err != nil || far.o != cache.Pass || !bytes.Equal(far.got, body[size-1000:size-500]) {
			t.Errorf("a range far ahead: %d bytes, %v, %v; want 500, passed", len(far.got), far.o, far.err)
		}
		close(release)
		if r := <-whole; !errors.Is(r.err, cache.ErrMismatch) || int64(len(r.got)) >= size {
			t.Errorf("whole: %d of %d bytes, %v", len(r.got), size, r.err)
		}
		if r := <-tail; r.err == nil {
			t.Errorf("the tail of wrong content was given: %d bytes", len(r.got))
		}
	})
}

type waiting struct{ c chan struct{} }

func (w waiting) Read([]byte) (int, error) { <-w.c; return 0, io.EOF }

// Ranges of content that is here, arriving or neither are the same bytes.
func TestRanges(t *testing.T) {
	body := content(1 << 20)
	dgst := digest.FromBytes(body)
	c, dir := start(t, options{})
	src := &source{body: body}
	for _, state := range []string{"cold", "warm"} {
		for _, r := range [][2]int64{{0, 1}, {0, 1 << 20}, {1<<20 - 1, 1}, {500_000, 1000}} {
			got, _, err := getRange(t.Context(), c, dgst, src, r[0], r[1])
			if err != nil || !bytes.Equal(got, body[r[0]:r[0]+r[1]]) {
				t.Errorf("%s range %v: %d bytes, %v", state, r, len(got), err)
			}
		}
		settled(c)
	}
	if src.opened() != 1 {
		t.Errorf("source opened %d times, want 1", src.opened())
	}
	nothingWrong(t, c, dir)
}

// A file that somebody removed is a miss, not an error.
func TestRemovedFileIsFetchedAgain(t *testing.T) {
	c, dir := start(t, options{})
	body := content(1000)
	src := &source{body: body}
	for range 2 {
		if got, _, err := get(t.Context(), c, digest.FromBytes(body), src); err != nil || !bytes.Equal(got, body) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		nothingWrong(t, c, dir)
		if err := os.Remove(filepath.Join(dir, "blobs/sha256", digest.FromBytes(body).Encoded())); err != nil {
			t.Fatal(err)
		}
	}
	if src.opened() != 2 {
		t.Errorf("source opened %d times, want 2", src.opened())
	}
}
