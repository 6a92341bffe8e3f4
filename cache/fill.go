package cache

import (
	"context"
	_ "crypto/sha256" // registered for go-digest
	_ "crypto/sha512"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

var (
	// errUncached ends a fill for which there is no room. Its readers go on
	// from the source, each for itself.
	errUncached = errors.New("no room to keep the content")

	// errAbandoned ends a fill that no request is reading any more.
	errAbandoned = errors.New("every reader left")

	// ErrClosing ends the fills of a cache that shuts down.
	ErrClosing = errors.New("the cache is shutting down")
)

// A fill is one download of one digest, shared by every request that wants it.
//
// run is the only goroutine that writes; it belongs to the Cache, not to the
// request that happened to come first, so a client that hangs up cannot take
// the others down with it. Readers trail behind it through the same file.
//
// The last bytes are released only once the digest has been verified, so nobody
// ever holds a complete copy of content that turned out to be wrong.
type fill struct {
	c      *Cache
	dgst   digest.Digest
	src    Source
	ahead  bool // a prefetch
	cancel context.CancelCauseFunc

	opened chan struct{} // closed once the source has answered or failed
	left   int64         // bytes that an earlier fill had left; run's own
	size   int64         // of the content, -1 when not known; set before opened is closed
	part   Partial       // set before opened is closed; nil when err was set at once

	done     chan struct{} // closed when run has ended and the fill is off the list
	dying    bool          // abandoned, not to be joined; guarded by c.mu
	readers  int           // guarded by c.mu
	goodbye  *time.Timer   // runs while there are no readers; guarded by c.mu
	reserved int64         // bytes promised by the index; guarded by c.mu

	mu    sync.Mutex
	n     int64         // bytes [0, n) may be read
	err   error         // why the fill ended: io.EOF when verified, nil while running
	rest  hash.Hash     // with errUncached: the state of the hash after n bytes
	grown chan struct{} // closed and replaced whenever n or err changes
}

// begin starts a fill without readers. c.mu is held.
func (c *Cache) begin(ctx context.Context, dgst digest.Digest, src Source) *fill {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	f := &fill{
		c: c, dgst: dgst, src: src, cancel: cancel, size: -1,
		opened: make(chan struct{}), done: make(chan struct{}), grown: make(chan struct{}),
	}
	f.goodbye = time.AfterFunc(c.grace, func() { c.abandon(f) })
	c.fills[dgst] = f
	c.index.removePartial(dgst) // what an earlier fill left is not to be evicted now
	c.wg.Go(func() {
		f.run(ctx)
		cancel(nil)
	})
	return f
}

// enter adds a reader. c.mu is held.
func (f *fill) enter() {
	f.readers++
	f.goodbye.Stop()
}

// leave takes a reader away. The last one leaves the fill running for a while.
func (c *Cache) leave(f *fill) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.readers--
	if f.readers == 0 && c.fills[f.dgst] == f {
		f.goodbye.Reset(c.grace)
	}
}

// abandon stops a fill that has had no readers for the time of grace.
func (c *Cache) abandon(f *fill) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.readers == 0 {
		f.dying = true
		f.cancel(errAbandoned)
	}
}

// run downloads until the content is verified, fails, or is abandoned, stores
// it, and takes the fill off the list.
func (f *fill) run(ctx context.Context) {
	n, sum, err := f.download(ctx)
	if v, ok := f.src.(Verified); ok && err == nil {
		v.Verified()
	}
	if err == nil {
		f.publish(n, io.EOF, nil) // before the disk is waited for: it is right
	}
	committed := false
	if f.part != nil {
		switch {
		case err == nil:
			cerr := f.part.Commit()
			if committed = cerr == nil; !committed {
				f.c.log.Warn().Err(cerr).Str("digest", f.dgst.String()).Msg("content was served but could not be stored")
				f.c.failures.add("store")
			}
		case errors.Is(err, ErrMismatch):
			err = errors.Join(err, f.part.Discard())
		default:
			if kerr := f.part.Keep(); kerr != nil {
				err = errors.Join(err, kerr)
			}
		}
	}
	c := f.c
	c.mu.Lock()
	f.goodbye.Stop()
	delete(c.fills, f.dgst)
	c.index.release(f.reserved)
	switch {
	case committed:
		c.index.add(f.dgst, n, c.now())
	case err != nil && f.part != nil && !errors.Is(err, ErrMismatch):
		c.index.addPartial(f.dgst, f.part.Size())
	}
	if f.ahead {
		c.ahead--
		c.prefetchNext()
	}
	c.mu.Unlock()
	if committed {
		c.Repin() // it may belong to what is pinned, or not
	}
	if err != nil {
		f.failed(ctx, n, sum, err)
	}
	close(f.done)
}

// failed tells the readers, and the operator if it concerns him.
func (f *fill) failed(ctx context.Context, n int64, sum hash.Hash, err error) {
	if cause := context.Cause(ctx); cause != nil {
		err = fmt.Errorf("fill %s: %w", f.dgst, cause)
	}
	f.publish(n, err, sum)
	f.open(-1)
	reason := "source"
	switch {
	case errors.Is(err, ErrMismatch):
		reason = "mismatch"
		line := f.c.log.Error().Err(err).Str("source", f.src.Name())
		if f.left > 0 {
			line = line.Int64("left_by_an_earlier_fill", f.left) // which may be what was wrong
		}
		line.Msg("wrong content was refused; nobody got a complete copy")
	case errors.Is(err, errUncached):
		reason = "no room"
		f.c.log.Warn().Err(err).Str("source", f.src.Name()).Msg("content is served without being kept")
	case errors.Is(err, errAbandoned), errors.Is(err, ErrClosing):
		reason = "abandoned"
	case errors.Is(err, fs.ErrNotExist):
		return // an answer, not a failure
	}
	f.c.failures.add(reason)
}

// Retries of a fill that was cut: the waits double from the first to about six
// seconds in all, and start over whenever bytes arrive.
const (
	retries    = 6
	retryFirst = 100 * time.Millisecond
)

// download gets all bytes into f.part. It returns how many there are and the
// state of their hash, also with an error.
func (f *fill) download(ctx context.Context) (n int64, sum hash.Hash, err error) {
	sum = f.dgst.Algorithm().Hash()
	part, err := f.c.store.Begin(f.dgst)
	if err != nil {
		return 0, sum, fmt.Errorf("fill %s: %w: %w", f.dgst, errUncached, err)
	}
	f.part = part
	if n, err = f.rehash(sum); err != nil {
		// What is left cannot even be read: begin afresh.
		if err := f.part.Reset(); err != nil {
			return 0, sum, fmt.Errorf("fill %s: %w: %w", f.dgst, errUncached, err)
		}
		sum.Reset()
		n = 0
	}
	f.left = n
	if f.matches(sum, n) {
		if _, asked := f.src.(Verified); !asked {
			f.open(n)
			return n, sum, nil
		}
		// Whether this source has it, too, must come from the source.
		if err := f.part.Reset(); err != nil {
			return n, sum, fmt.Errorf("fill %s: %w", f.dgst, err)
		}
		sum.Reset()
		n, f.left = 0, 0
	}
	for try, before := 0, n; ; try++ {
		content, oerr := f.src.Open(ctx, n, -1)
		if oerr != nil {
			if errors.Is(oerr, ErrRange) && !f.isOpen() && n > 0 {
				// What was left here is longer than the content: it is not of it.
				if err := f.part.Reset(); err != nil {
					return n, sum, fmt.Errorf("fill %s: %w", f.dgst, err)
				}
				sum.Reset()
				n, before = 0, 0
				continue
			}
			if !f.isOpen() || errors.Is(oerr, fs.ErrNotExist) {
				return n, sum, oerr
			}
			err = fmt.Errorf("fill %s: resume at %d: %w", f.dgst, n, oerr)
		} else {
			n, err = f.stream(content, n, sum)
			content.Body.Close()
			if err == nil || errors.Is(err, ErrMismatch) || errors.Is(err, errUncached) {
				return n, sum, err
			}
		}
		if n > before {
			try, before = 0, n
		}
		if try == retries || ctx.Err() != nil {
			return n, sum, err
		}
		select {
		case <-time.After(retryFirst << try):
		case <-ctx.Done():
			return n, sum, err
		}
	}
}

// rehash reads what an earlier attempt left, so that hashing can go on there.
func (f *fill) rehash(sum hash.Hash) (int64, error) {
	have := f.part.Size()
	if have == 0 {
		return 0, nil
	}
	file, err := f.part.Open()
	if err != nil {
		return 0, fmt.Errorf("fill %s: %w", f.dgst, err)
	}
	defer file.Close()
	n, err := io.Copy(sum, file)
	if err == nil && n != have {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// matches tells whether an earlier attempt had already got everything.
func (f *fill) matches(sum hash.Hash, n int64) bool {
	return n > 0 && digest.NewDigest(f.dgst.Algorithm(), sum) == f.dgst
}

// stream appends content to the n bytes that are here, and verifies the whole
// when it ends.
func (f *fill) stream(content *Content, n int64, sum hash.Hash) (int64, error) {
	if content.Offset != n {
		if content.Offset != 0 {
			return n, fmt.Errorf("fill %s: source began at %d, not at %d", f.dgst, content.Offset, n)
		}
		// The source does not resume. What readers have already got is skipped;
		// what only an earlier process had is fetched again.
		if !f.isOpen() {
			if err := f.part.Reset(); err != nil {
				return n, fmt.Errorf("fill %s: %w", f.dgst, err)
			}
			sum.Reset()
			n = 0
		} else if _, err := io.CopyN(io.Discard, content.Body, n); err != nil {
			return n, fmt.Errorf("fill %s: %w", f.dgst, err)
		}
	}
	if f.isOpen() {
		if f.size >= 0 && content.Size >= 0 && content.Size != f.size {
			return n, fmt.Errorf("fill %s: source now says %d bytes, not %d", f.dgst, content.Size, f.size)
		}
	} else {
		if err := f.c.reserve(f, max(content.Size, 0)); err != nil {
			return n, err
		}
		f.publish(min(n, max(content.Size-1, 0)), nil, nil)
		f.open(content.Size)
	}
	bp := buffers.Get().(*[]byte)
	defer buffers.Put(bp)
	buf := *bp
	for {
		m, rerr := content.Body.Read(buf)
		if m > 0 {
			if f.size < 0 {
				f.publish(n, nil, nil) // the chunk before this one was not the last
				if err := f.c.reserve(f, n+int64(m)); err != nil {
					return n, err
				}
			}
			if _, err := f.part.Write(buf[:m]); err != nil {
				return n, fmt.Errorf("fill %s: %w: %w", f.dgst, errUncached, err)
			}
			sum.Write(buf[:m])
			n += int64(m)
			if n < f.size {
				f.publish(n, nil, nil)
			}
		}
		complete := n == f.size || f.size < 0 && rerr == io.EOF
		switch {
		case complete && digest.NewDigest(f.dgst.Algorithm(), sum) == f.dgst:
			return n, nil // whatever the source still has to say
		case complete, f.size >= 0 && n > f.size:
			return n, fmt.Errorf("fill %s from %s: %w after %d bytes", f.dgst, f.src.Name(), ErrMismatch, n)
		case rerr == io.EOF:
			return n, fmt.Errorf("fill %s: %w", f.dgst, io.ErrUnexpectedEOF)
		case rerr != nil:
			return n, fmt.Errorf("fill %s: %w", f.dgst, rerr)
		}
	}
}

// buffers hold a chunk between network and disk. A fill that is behind gets
// them full, and so costs few system calls and wakes its readers seldom.
var buffers = sync.Pool{New: func() any { b := make([]byte, 1<<20); return &b }}

// open lets those who wait for the source go on.
func (f *fill) open(size int64) {
	if !f.isOpen() {
		f.size = size
		close(f.opened)
	}
}

func (f *fill) isOpen() bool {
	select {
	case <-f.opened:
		return true
	default:
		return false
	}
}

// opening waits until the size is known or the source has failed.
func (f *fill) opening(ctx context.Context) error {
	select {
	case <-f.opened:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == io.EOF || f.n > 0 || (errors.Is(f.err, errUncached) && f.size >= 0) {
		return nil // there is something to read, whatever came after
	}
	return f.err
}

// publish wakes the readers. n never goes backwards, and an end is final.
func (f *fill) publish(n int64, err error, rest hash.Hash) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && n <= f.n {
		return
	}
	if err == nil || err == io.EOF || errors.Is(err, errUncached) {
		f.n = max(f.n, n)
	}
	f.err, f.rest = err, rest
	close(f.grown)
	f.grown = make(chan struct{})
}

// wait blocks until there is something to read past off, or nothing ever will
// be. It returns how much there is.
func (f *fill) wait(ctx context.Context, off int64) (n int64, err error) {
	for {
		f.mu.Lock()
		n, err, grown := f.n, f.err, f.grown
		f.mu.Unlock()
		if n > off {
			return n - off, nil
		}
		if err != nil {
			return 0, err
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// end is how the fill ended, nil while it runs.
func (f *fill) end() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// frontier is how many bytes may be read.
func (f *fill) frontier() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

// stats tells how far the fill is. c.mu is held.
func (f *fill) stats() FillStats {
	s := FillStats{Digest: f.dgst, Size: -1, Have: f.frontier(), Readers: f.readers}
	if f.isOpen() {
		s.Size = f.size
	}
	return s
}
