package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/opencontainers/go-digest"
)

// Holds tells the size of dgst in bytes if it is stored whole. Nobody is asked, and it
// counts as no use.
func (c *Cache) Holds(dgst digest.Digest) (size int64, ok bool) {
	c.mu.Lock()
	e, stored := c.index.get(dgst)
	ready := c.index.ready
	c.mu.Unlock()
	switch {
	case stored:
		return e.size, true
	case ready:
		return 0, false
	}
	file, entry, err := c.store.Open(dgst)
	if err != nil {
		return 0, false
	}
	file.Close()
	return entry.Size, true
}

// OpenStored opens what is stored, as it is. Absent content is fs.ErrNotExist. It
// counts as no use.
func (c *Cache) OpenStored(dgst digest.Digest) (File, error) {
	f, _, err := c.store.Open(dgst)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dgst, err)
	}
	return f, nil
}

// Verify reads what is stored and compares it with its digest: ErrMismatch if it is not
// that, fs.ErrNotExist if it is not here. It removes nothing, and counts as no use.
func (c *Cache) Verify(ctx context.Context, dgst digest.Digest) error {
	_, err := c.verify(ctx, dgst, func(int) error { return ctx.Err() })
	return err
}

// verify tells pace of each piece that it has read, in bytes.
func (c *Cache) verify(ctx context.Context, dgst digest.Digest, pace func(n int) error) (size int64, err error) {
	file, entry, err := c.store.Open(dgst)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", dgst, err)
	}
	defer file.Close()
	got, err := hashOf(file, dgst.Algorithm(), pace)
	switch {
	case err != nil:
		return entry.Size, fmt.Errorf("read %s: %w", dgst, err)
	case got != dgst:
		return entry.Size, fmt.Errorf("stored content %s hashes to %s: %w", dgst, got, ErrMismatch)
	}
	return entry.Size, context.Cause(ctx)
}

// hashOf reads all of r. It tells pace of each piece, in bytes, and ends with its error.
func hashOf(r io.Reader, a digest.Algorithm, pace func(n int) error) (digest.Digest, error) {
	digester, buf := a.Digester(), buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := r.Read(*buf)
		digester.Hash().Write((*buf)[:n])
		if perr := pace(n); perr != nil {
			return "", perr
		}
		if err == io.EOF {
			return digester.Digest(), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// ErrPinned reports content that is pinned firmly.
var ErrPinned = errors.New("the content is pinned")

// ErrNotReady reports a cache that does not know yet what it holds and what is pinned.
var ErrNotReady = errors.New("the cache is still finding out what it holds; try again in a moment")

// Remove takes content out. What is pinned firmly stays, which is ErrPinned; what is not
// stored is fs.ErrNotExist. Whoever is reading it goes on.
func (c *Cache) Remove(dgst digest.Digest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, stored := c.index.get(dgst)
	switch {
	case !c.index.ready || !c.index.pinned:
		return ErrNotReady
	case !stored:
		return fmt.Errorf("remove %s: %w", dgst, fs.ErrNotExist)
	case e.grip == firm:
		return fmt.Errorf("remove %s: %w", dgst, ErrPinned)
	}
	if err := c.store.Remove(Entry{Digest: dgst, Size: e.size}); err != nil {
		return fmt.Errorf("remove %s: %w", dgst, err)
	}
	c.index.remove(dgst)
	c.hot.remove(dgst)
	return nil
}

// FitsPinned tells whether content could be pinned firmly in addition to what is, with
// more bytes that are not here yet. An error is ErrNoRoom and says how much there is.
func (c *Cache) FitsPinned(content []digest.Digest, more int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.index.ready || !c.index.pinned {
		return ErrNotReady
	}
	for _, d := range content {
		if e, stored := c.index.get(d); stored && e.grip < firm {
			more += e.size
		}
	}
	if pinned := c.index.sizes[firm]; pinned+more > c.maxBytes {
		return fmt.Errorf("%d bytes are pinned and %d would be added, which is more than the %d that the cache may have: %w", pinned, more, c.maxBytes, ErrNoRoom)
	}
	return nil
}
