package bundle

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/taglog"
)

// Checks are what Read asks and tells its caller, in this order: Verifier, Begin,
// Event for each event, then Describe and Content for each manifest, Content for
// each blob. No two calls overlap. Only when Read returns nil is the bundle whole;
// what Begin, Event and Content did before Read fails is the caller's to leave or to
// undo.
type Checks struct {
	// Verifier returns the trusted verifier that vkey claims to be, or why the
	// bundle is not trusted; Read returns that error. That vkey has signed the list,
	// which is known by then, is no reason to trust it. Both it and the verifier that
	// is returned must have signed the list and the checkpoint. Required.
	Verifier func(vkey string) (note.Verifier, error)

	// Describe says what a manifest refers to; its error makes the bundle wrong.
	// The manifest is the one that is listed. Required.
	Describe func(manifest []byte) (Description, error)

	// Begin is told the list, which is signed and right in itself. Nothing that it
	// lists has been read. Whether what a delta omits is here is for Begin to see.
	Begin func(Contents) error

	// Event is told each event, which is signed for, proven, about an image of the
	// list, and goes on from the one before of its ref. That the last ones are those
	// which the list promises is not known before all were read.
	Event func(audit.Entry) error

	// Content takes in content, manifests first. r fails instead of handing out
	// the last bytes of what does not hash to b.Digest. What it does not read, Read
	// does. r is not to be used after it returns.
	Content func(ctx context.Context, b Blob, r io.Reader) error
}

// Read checks a whole bundle, to the last byte of r, in one pass. Its error is a
// WrongError if the bundle is not what it should be; otherwise it is that of r,
// of ctx or of one of the checks.
func Read(ctx context.Context, r io.Reader, checks Checks) (Contents, error) {
	rd := newReader(ctx, r)
	c, keys, err := rd.list(checks.Verifier)
	if err != nil {
		return Contents{}, err
	}
	if checks.Begin != nil {
		if err := checks.Begin(c); err != nil {
			return Contents{}, err
		}
	}
	tree, err := rd.checkpoint(c, keys)
	if err != nil {
		return Contents{}, err
	}
	if err := rd.events(c, tree, checks.Event); err != nil {
		return Contents{}, err
	}
	cl, err := newClosure(c)
	if err != nil {
		return Contents{}, err
	}
	for _, b := range c.Manifests {
		m, err := rd.listed(blobEntry(b.Digest), b)
		if err != nil {
			return Contents{}, err
		}
		d, err := checks.Describe(m)
		if err != nil {
			return Contents{}, wrong(blobEntry(b.Digest), "%v", err)
		}
		if err := cl.check(b.Digest, d); err != nil {
			return Contents{}, err
		}
		if checks.Content == nil {
			continue
		}
		if err := checks.Content(ctx, b, bytes.NewReader(m)); err != nil {
			return Contents{}, fmt.Errorf("%s: %w", blobEntry(b.Digest), err)
		}
	}
	if err := cl.end(); err != nil {
		return Contents{}, err
	}
	for _, b := range c.Blobs {
		if err := rd.content(b, checks.Content); err != nil {
			return Contents{}, err
		}
	}
	if err := rd.end(); err != nil {
		return Contents{}, err
	}
	return c, nil
}

// ReadContents reads no further than the list and its key, and returns it if it is
// signed by a verifier that is trusted. That the bundle has what it lists, and its
// log says so, is not known.
func ReadContents(r io.Reader, verifier func(vkey string) (note.Verifier, error)) (Contents, error) {
	c, _, err := newReader(context.Background(), r).list(verifier)
	return c, err
}

// A reader reads entry by entry what Write wrote, and nothing else.
type reader struct {
	in *input
}

func newReader(ctx context.Context, r io.Reader) *reader {
	return &reader{&input{ctx: ctx, r: r}}
}

// list reads as far as the key, and returns the list and the keys that signed it:
// the bundle's own, and the one that is trusted in its name.
func (rd *reader) list(trusted func(vkey string) (note.Verifier, error)) (Contents, []note.Verifier, error) {
	if err := rd.header(layoutEntry, int64(len(layout))); err != nil {
		return Contents{}, nil, err
	}
	if b, err := rd.whole(layoutEntry, int64(len(layout))); err != nil {
		return Contents{}, nil, err
	} else if string(b) != layout {
		return Contents{}, nil, wrong(layoutEntry, "is %q, want %s", b, layout)
	}
	index, err := rd.sum(indexEntry, maxList)
	if err != nil {
		return Contents{}, nil, err
	}
	list, err := rd.unlisted(contentsEntry, maxList)
	if err != nil {
		return Contents{}, nil, err
	}
	signature, err := rd.unlisted(signatureEntry, maxSmall)
	if err != nil {
		return Contents{}, nil, err
	}
	vkey, err := rd.unlisted(vkeyEntry, maxSmall)
	if err != nil {
		return Contents{}, nil, err
	}
	line, ok := bytes.CutSuffix(vkey, []byte("\n"))
	if !ok {
		return Contents{}, nil, wrong(vkeyEntry, "is not a line")
	}
	own, err := openKey(string(line))
	if err != nil {
		return Contents{}, nil, err
	}
	id := digest.FromBytes(list)
	if err := verify(signature, id, own); err != nil {
		return Contents{}, nil, err
	}
	known, err := trusted(string(line))
	if err != nil {
		return Contents{}, nil, fmt.Errorf("%s: %w", vkeyEntry, err)
	}
	if err := verify(signature, id, known); err != nil {
		return Contents{}, nil, err
	}
	c, err := parse(list)
	if err != nil {
		return Contents{}, nil, err
	}
	if c.Origin != own.Name() {
		return Contents{}, nil, wrong(contentsEntry, "is of the log %q, and signed by the key of %q", c.Origin, own.Name())
	}
	if index != digest.FromBytes(c.index()) {
		return Contents{}, nil, wrong(indexEntry, "is not the index of the images in %s", contentsEntry)
	}
	return c, []note.Verifier{own, known}, nil
}

// checkpoint reads the checkpoint, and returns its tree.
func (rd *reader) checkpoint(c Contents, keys []note.Verifier) (tlog.Tree, error) {
	if c.Checkpoint.Size > maxSmall {
		return tlog.Tree{}, wrong(checkpointEntry, "cannot have %d bytes", c.Checkpoint.Size)
	}
	signed, err := rd.listed(checkpointEntry, c.Checkpoint)
	if err != nil {
		return tlog.Tree{}, err
	}
	var tree tlog.Tree
	for _, key := range keys {
		open, err := taglog.Open(signed, key)
		if err != nil {
			return tlog.Tree{}, wrong(checkpointEntry, "by the key %s: %v", keyName(key), err)
		}
		tree = open.Tree
	}
	if tree.N != c.LogSize {
		return tlog.Tree{}, wrong(checkpointEntry, "is of %d entries, the list says %d", tree.N, c.LogSize)
	}
	return tree, nil
}

// events reads the events, checks each, and tells of it.
func (rd *reader) events(c Contents, tree tlog.Tree, tell func(audit.Entry) error) error {
	h, err := newHistory(c, tree)
	if err != nil {
		return err
	}
	body, err := rd.body(eventsEntry, Blob{c.Events.Digest, c.Events.Size})
	if err != nil {
		return err
	}
	lines := bufio.NewReaderSize(body, int(min(maxLine-1, c.Events.Size)+1))
	count := int64(0)
	for ; ; count++ {
		b, err := lines.ReadSlice('\n')
		if err == io.EOF && len(b) == 0 {
			break
		}
		if body.err != nil {
			return body.err
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			return wrong(eventsEntry, "line %d is longer than %d bytes", count+1, maxLine)
		case err != nil:
			return wrong(eventsEntry, "line %d has no end", count+1)
		}
		e, proof, err := parseLine(b)
		if err != nil {
			return wrong(eventsEntry, "line %d: %v", count+1, err)
		}
		if err := h.add(e, proof); err != nil {
			return err
		}
		if tell == nil {
			continue
		}
		if err := tell(e); err != nil {
			return fmt.Errorf("event %d: %w", e.Index, err)
		}
	}
	if count != c.Events.Count {
		return wrong(eventsEntry, "has %d events, the list says %d", count, c.Events.Count)
	}
	if err := h.end(); err != nil {
		return err
	}
	return rd.pad(eventsEntry, c.Events.Size)
}

// content reads the entry of b and has take take it in.
func (rd *reader) content(b Blob, take func(context.Context, Blob, io.Reader) error) error {
	entry := blobEntry(b.Digest)
	body, err := rd.body(entry, b)
	if err != nil {
		return err
	}
	if take != nil {
		err = take(rd.in.ctx, b, body)
	}
	if err == nil {
		_, err = io.Copy(io.Discard, body)
	}
	switch {
	case body.err != nil: // it knows better than who could not read it
		return body.err
	case err != nil:
		return fmt.Errorf("%s: %w", entry, err)
	}
	return rd.pad(entry, b.Size)
}

// end reads the end, and that nothing follows.
func (rd *reader) end() error {
	const entry = "the end of the bundle"
	var b [block]byte
	for range len(zeros) / block {
		if _, err := io.ReadFull(rd.in, b[:]); err != nil {
			return rd.in.short(entry)
		}
		if b != [block]byte(zeros[:block]) {
			return wrong(entry, "in its place is %s, %q, which is not listed", kindField(b[:]), nameField(b[:]))
		}
	}
	if n, _ := io.ReadFull(rd.in, b[:1]); n > 0 {
		return wrong(entry, "is followed by something")
	}
	if rd.in.err != nil {
		return rd.in.short(entry)
	}
	return nil
}

// header reads the header of an entry whose size is known.
func (rd *reader) header(entry string, size int64) error {
	var got [block]byte
	want := header(entry, size)
	for ; len(want) > 0; want = want[block:] {
		if _, err := io.ReadFull(rd.in, got[:]); err != nil {
			return rd.in.short(entry)
		}
		if !bytes.Equal(got[:], want[:block]) {
			return misfit(entry, got[:], want[:block])
		}
	}
	return nil
}

// sized reads the header of an entry that says itself how many bytes it has.
func (rd *reader) sized(entry string, max int64) (int64, error) {
	var got [block]byte
	if _, err := io.ReadFull(rd.in, got[:]); err != nil {
		return 0, rd.in.short(entry)
	}
	size := sizeOf(got[:])
	if want := header(entry, size); !bytes.Equal(got[:], want) {
		return 0, misfit(entry, got[:], want)
	}
	if size > max {
		return 0, wrong(entry, "has %d bytes, more than %d", size, max)
	}
	return size, nil
}

// unlisted reads an entry that the list has no digest of.
func (rd *reader) unlisted(entry string, max int64) ([]byte, error) {
	size, err := rd.sized(entry, max)
	if err != nil {
		return nil, err
	}
	return rd.whole(entry, size)
}

// whole reads what follows a header. It does not believe the size before that
// much has come.
func (rd *reader) whole(entry string, size int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(rd.in, size))
	if err != nil || int64(len(b)) < size {
		return nil, rd.in.short(entry)
	}
	return b, rd.pad(entry, size)
}

// sum reads an entry of which nothing but the digest is wanted.
func (rd *reader) sum(entry string, max int64) (digest.Digest, error) {
	size, err := rd.sized(entry, max)
	if err != nil {
		return "", err
	}
	digester := digest.SHA256.Digester()
	if n, err := io.Copy(digester.Hash(), io.LimitReader(rd.in, size)); err != nil || n < size {
		return "", rd.in.short(entry)
	}
	return digester.Digest(), rd.pad(entry, size)
}

// listed reads a whole entry that is small, as the list says, which is signed.
func (rd *reader) listed(entry string, b Blob) ([]byte, error) {
	body, err := rd.body(entry, b)
	if err != nil {
		return nil, err
	}
	content := make([]byte, b.Size)
	if _, err := io.ReadFull(body, content); err != nil {
		return nil, err
	}
	return content, rd.pad(entry, b.Size)
}

// pad reads what fills the last block of an entry.
func (rd *reader) pad(entry string, size int64) error {
	var b [block]byte
	pad := b[:padding(size)]
	if _, err := io.ReadFull(rd.in, pad); err != nil {
		return rd.in.short(entry)
	}
	if !bytes.Equal(pad, zeros[:len(pad)]) {
		return wrong(entry, "is followed by something else than zeros")
	}
	return nil
}

// body reads the header of an entry that is listed, and returns its content.
func (rd *reader) body(entry string, b Blob) (*body, error) {
	if err := rd.header(entry, b.Size); err != nil {
		return nil, err
	}
	content := &body{in: rd.in, entry: entry, listed: b, left: b.Size, digester: b.Digest.Algorithm().Digester()}
	if b.Size == 0 {
		content.verify()
	}
	return content, content.err
}

// A body is the content of an entry. It does not hand out its last bytes unless
// it hashes to the digest that is listed: what is wrong is never complete.
type body struct {
	in       *input
	entry    string
	listed   Blob
	left     int64
	digester digest.Digester
	err      error // why it cannot be read to its end
}

func (b *body) Read(p []byte) (int, error) {
	switch {
	case b.err != nil:
		return 0, b.err
	case b.left == 0:
		return 0, io.EOF
	case int64(len(p)) > b.left:
		p = p[:b.left]
	}
	n, err := b.in.Read(p)
	b.digester.Hash().Write(p[:n])
	b.left -= int64(n)
	switch {
	case b.left == 0 && n > 0:
		if b.verify(); b.err != nil {
			return 0, b.err
		}
	case err != nil:
		b.err = b.in.short(b.entry)
	}
	return n, b.err
}

// WriteTo writes what is left, for io.Copy, in large pieces.
func (b *body) WriteTo(w io.Writer) (written int64, err error) {
	if b.in.piece == nil {
		b.in.piece = make([]byte, piece)
	}
	for {
		n, err := b.Read(b.in.piece)
		if n > 0 {
			m, err := w.Write(b.in.piece[:n])
			if written += int64(m); err != nil {
				return written, err
			}
		}
		switch {
		case err == io.EOF:
			return written, nil
		case err != nil:
			return written, err
		}
	}
}

func (b *body) verify() {
	if got := b.digester.Digest(); got != b.listed.Digest {
		b.err = wrong(b.entry, "its %d bytes hash to %s, the list says %s", b.listed.Size, got, b.listed.Digest)
	}
}

// An input is where bytes come from. It remembers why it failed, for those above
// it cannot tell an end that comes too early from an error.
type input struct {
	ctx context.Context
	r   io.Reader
	err error // of ctx or r, not io.EOF

	piece []byte // that bodies are copied by, one after the other; nil before the first
}

func (in *input) Read(p []byte) (int, error) {
	if in.err == nil {
		in.err = in.ctx.Err()
	}
	if in.err != nil {
		return 0, in.err
	}
	n, err := in.r.Read(p)
	if err != nil && err != io.EOF {
		in.err = err
	}
	return n, err
}

// short is why less was read than an entry has.
func (in *input) short(entry string) error {
	if in.err != nil {
		return fmt.Errorf("%s: %w", entry, in.err)
	}
	return wrong(entry, "the bundle ends before or in it")
}
