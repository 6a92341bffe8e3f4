package cache

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

// A Blob is content that can be read, whether it is here or still arriving.
type Blob struct {
	Digest  digest.Digest
	Size    int64 // bytes, -1 when not known yet
	Outcome Outcome

	c    *Cache
	file File  // stored content
	fill *fill // or arriving
	src  Source
	pass *Content // or not kept at all

	cancel context.CancelFunc // ends pass
}

// Close lets go of the content. A fill goes on without us for a while.
func (b *Blob) Close() error {
	if b.fill != nil {
		b.c.leave(b.fill)
	}
	if b.pass != nil {
		b.cancel()
		return b.pass.Body.Close()
	}
	if b.file != nil {
		return b.file.Close()
	}
	return nil
}

// farAhead is how many bytes a range waits for the frontier of a fill; one that
// begins further ahead is fetched by itself.
const farAhead = 16 << 20

// Section returns what writes n bytes from byte off on, or everything when n is
// -1. It fails where the source fails, so that the caller can still answer with
// an error; what it returns writes all of the section or fails half-way.
//
// The last byte of content that is not verified yet is never part of what is
// written, in a section or elsewhere: such a section waits for the fill.
func (b *Blob) Section(ctx context.Context, off, n int64) (io.WriterTo, error) {
	end := int64(-1)
	if n >= 0 {
		end = off + n
	} else if b.Size >= 0 {
		end = b.Size
	}
	switch {
	case b.file != nil:
		if _, err := b.file.Seek(off, io.SeekStart); err != nil {
			return nil, fmt.Errorf("read %s: %w", b.Digest, err)
		}
		return stored{b.c, b.file, end - off}, nil
	case b.pass != nil && end >= 0 && end < b.Size:
		return b.distant(ctx, off, n) // there is nothing that all of it would be fetched for
	case b.pass != nil:
		return &passing{b: b, content: b.pass, sum: b.Digest.Algorithm().Hash(), off: off, end: end}, nil
	}
	if b.Size >= 0 && end < b.Size && off > b.fill.frontier()+farAhead {
		return b.distant(ctx, off, n)
	}
	if b.Size == 0 {
		// There is no last byte to hold back: all of it waits.
		if _, err := b.fill.wait(ctx, 0); err != io.EOF && !errors.Is(err, errUncached) {
			return nil, err
		}
	}
	file, err := b.fill.part.Open()
	if err != nil {
		return b.reopen(ctx, off, end, err)
	}
	if off > 0 {
		if _, err := file.Seek(off, io.SeekStart); err != nil {
			file.Close()
			return nil, fmt.Errorf("read %s: %w", b.Digest, err)
		}
	}
	return &arriving{ctx: ctx, b: b, file: file, off: off, end: end}, nil
}

// distant opens a section by itself, straight from the source.
func (b *Blob) distant(ctx context.Context, off, n int64) (io.WriterTo, error) {
	content, err := b.src.Open(ctx, off, n)
	if err != nil {
		return nil, err
	}
	b.Outcome = Pass
	return &distant{content, off, n}, nil
}

// reopen is for a fill that ended, and whose file went, before this reader had
// opened it: either it was wrong, or there was no way to store it.
func (b *Blob) reopen(ctx context.Context, off, end int64, cause error) (io.WriterTo, error) {
	select {
	case <-b.fill.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if err := b.fill.end(); err != io.EOF && !errors.Is(err, errUncached) {
		return nil, errors.Join(err, cause)
	}
	p, err := b.c.pass(ctx, b.Digest, b.src)
	if err != nil {
		return nil, err
	}
	b.pass, b.cancel, b.Outcome = p.pass, p.cancel, Pass
	return &passing{b: b, content: b.pass, sum: b.Digest.Algorithm().Hash(), off: off, end: end}, nil
}

// readAll returns the whole content, which must not be larger than limit.
func (b *Blob) readAll(ctx context.Context, limit int64) ([]byte, error) {
	if b.Size > limit {
		return nil, fmt.Errorf("%s: %w: it has %d bytes", b.Digest, ErrNotManifest, b.Size)
	}
	s, err := b.Section(ctx, 0, -1)
	if err != nil {
		return nil, err
	}
	w := &limitedBuffer{left: limit}
	if _, err := s.WriteTo(w); err != nil {
		return nil, err
	}
	return w.b, nil
}

type limitedBuffer struct {
	b    []byte
	left int64
}

func (w *limitedBuffer) Write(p []byte) (int, error) {
	if w.left -= int64(len(p)); w.left < 0 {
		return 0, errors.New("content is too large to be held in memory")
	}
	w.b = append(w.b, p...)
	return len(p), nil
}

// stored writes from a complete file. With an *os.File and a TCP connection
// this is sendfile(2).
type stored struct {
	c    *Cache
	file File
	n    int64
}

func (s stored) WriteTo(w io.Writer) (int64, error) {
	n, err := copyN(w, s.file, s.n)
	s.c.saved.Add(n)
	return n, err
}

// copyN is io.CopyN, which hands an *io.LimitedReader to w's ReadFrom; through
// a writer without one the bytes go in large chunks.
func copyN(w io.Writer, r io.Reader, n int64) (int64, error) {
	written, err := io.CopyN(w, r, n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF // the file is shorter than it was
	}
	return written, err
}

// An arriving section follows a fill through its file.
type arriving struct {
	ctx      context.Context // of the request that this is a part of
	b        *Blob
	file     File
	off, end int64 // end is -1 when the size is not known
}

func (a *arriving) WriteTo(w io.Writer) (written int64, err error) {
	defer a.file.Close()
	defer func() {
		if a.b.Outcome == Join {
			a.b.c.saved.Add(written)
		}
	}()
	held := true // w may hold back the head of the answer, or bytes
	for a.end < 0 || a.off < a.end {
		if held && a.b.fill.frontier() <= a.off {
			flush(w) // a client should have all there is before a wait
			held = false
		}
		n, err := a.b.fill.wait(a.ctx, a.off)
		switch {
		case err == io.EOF:
			return written, nil
		case errors.Is(err, errUncached):
			m, err := a.goOn(w)
			return written + m, err
		case err != nil:
			return written, err
		}
		if a.end >= 0 {
			n = min(n, a.end-a.off)
		}
		m, err := copyN(w, a.file, n)
		a.off += m
		written += m
		if err != nil {
			return written, err
		}
		held = a.b.Size < 0 || n < flushBelow
	}
	return written, nil
}

// flushBelow is the size of a piece, in bytes, that a writer may still hold
// back: net/http keeps up to 4 KiB; larger pieces go past its buffers.
const flushBelow = 8 << 10

// flush sends what w holds back, so that a client sees the bytes of a slow
// source as they come.
func flush(w io.Writer) {
	if f, ok := w.(interface{ Flush() }); ok {
		f.Flush()
	}
}

// goOn takes the rest from the source after the fill had no more room.
func (a *arriving) goOn(w io.Writer) (int64, error) {
	f := a.b.fill
	f.mu.Lock()
	n, rest := f.n, f.rest
	f.mu.Unlock()
	cloner, ok := rest.(hash.Cloner)
	if !ok {
		return 0, fmt.Errorf("read %s: %w", a.b.Digest, errUncached)
	}
	sum, err := cloner.Clone()
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", a.b.Digest, err)
	}
	content, err := a.b.src.Open(a.ctx, n, -1)
	if err != nil {
		return 0, err
	}
	defer content.Body.Close()
	if content.Offset != n {
		if _, err := io.CopyN(io.Discard, content.Body, n); err != nil {
			return 0, err
		}
	}
	a.b.Outcome = Pass
	p := &passing{b: a.b, content: content, sum: sum, at: n, off: a.off, end: a.end}
	return p.WriteTo(w)
}

// pass opens content that is not kept.
func (c *Cache) pass(ctx context.Context, dgst digest.Digest, src Source) (*Blob, error) {
	ctx, cancel := context.WithCancel(ctx)
	content, err := src.Open(ctx, 0, -1)
	if err != nil {
		cancel()
		return nil, err
	}
	return &Blob{Digest: dgst, Size: content.Size, Outcome: Pass, c: c, src: src, cancel: cancel, pass: content}, nil
}

// passChunk is what a reader that is passed on keeps in memory, twice. There is
// one for each client.
const passChunk = 32 << 10

// A passing section goes from the source to the client without being kept. Its
// bytes are hashed on the way and the last ones held back until they are known
// to be right.
type passing struct {
	b        *Blob
	content  *Content
	sum      hash.Hash
	at       int64 // where content.Body stands
	off, end int64
}

func (p *passing) WriteTo(w io.Writer) (written int64, err error) {
	buf := make([]byte, 2*passChunk)
	chunk, held := buf[:passChunk], buf[passChunk:passChunk] // held is read, hashed, and not written yet
	for {
		m, rerr := p.content.Body.Read(chunk)
		if m > 0 {
			n, err := w.Write(held)
			written += int64(n)
			if err != nil {
				return written, err
			}
			p.sum.Write(chunk[:m])
			from, to := max(p.off, p.at), p.at+int64(m)
			if p.end >= 0 {
				to = min(to, p.end)
			}
			held = held[:0]
			if from < to {
				held = append(held, chunk[from-p.at:to-p.at]...)
			}
			p.at += int64(m)
		}
		dgst := p.b.Digest
		switch {
		case p.end >= 0 && p.at >= p.end && p.end < p.b.Size, // the section ends before the last byte
			rerr == io.EOF && digest.NewDigest(dgst.Algorithm(), p.sum) == dgst:
			n, err := w.Write(held)
			return written + int64(n), err
		case rerr == io.EOF:
			return written, fmt.Errorf("pass %s: %w after %d bytes", dgst, ErrMismatch, p.at)
		case rerr != nil:
			return written, fmt.Errorf("pass %s: %w", dgst, rerr)
		}
	}
}

// A distant section is fetched by itself, because the fill is far from it or
// there is none. It never contains the last byte of the content.
type distant struct {
	content *Content
	off, n  int64
}

func (d *distant) WriteTo(w io.Writer) (int64, error) {
	defer d.content.Body.Close()
	if skip := d.off - d.content.Offset; skip > 0 {
		if _, err := io.CopyN(io.Discard, d.content.Body, skip); err != nil {
			return 0, err
		}
	}
	return copyN(w, d.content.Body, d.n)
}
