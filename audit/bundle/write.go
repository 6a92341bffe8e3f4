package bundle

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/taglog"
)

// An Export is what Write packs.
type Export struct {
	// Contents is the list, in any order. Write fills in V, Origin, LogSize,
	// Checkpoint and Events.
	Contents Contents

	Checkpoint []byte      // the signed tree that the proofs lead to
	VKey       string      // the log's key, as audit.Key has it
	Signer     note.Signer // the same key, for the list

	// Events yields the events of the images in order of their indexes. It is
	// called twice, since the list comes before them, and yields the same.
	Events func(context.Context) iter.Seq2[audit.Entry, error]
	Hashes tlog.HashReader // of the log, for the proofs

	// Open opens content that is listed. Its bytes need not be checked.
	Open func(context.Context, digest.Digest) (io.ReadCloser, error)
}

// Write packs a bundle into w and returns the ID of its list. The same export
// gives the same bytes. Content is copied as it comes and hashed on the way.
//
// What Read would refuse of the list, the events or the bytes of content is
// refused here; what manifests refer to is not looked at. After an error w has the
// beginning of a bundle, which no reader takes for a whole one.
func Write(ctx context.Context, w io.Writer, e Export) (digest.Digest, error) {
	list, tree, err := e.list(ctx)
	if err != nil {
		return "", err
	}
	c, err := parse(list)
	if err != nil {
		return "", err
	}
	id := digest.FromBytes(list)
	signature, err := e.sign(id)
	if err != nil {
		return "", err
	}
	out := &writer{ctx: ctx, w: bufio.NewWriterSize(w, 64<<10)}
	for _, f := range []struct {
		entry   string
		content []byte
		max     int
	}{
		{layoutEntry, []byte(layout), maxSmall},
		{indexEntry, c.index(), maxList},
		{contentsEntry, list, maxList},
		{signatureEntry, signature, maxSmall},
		{vkeyEntry, []byte(e.VKey + "\n"), maxSmall},
		{checkpointEntry, e.Checkpoint, maxSmall},
	} {
		if len(f.content) > f.max {
			return "", fmt.Errorf("%s has %d bytes, more than %d", f.entry, len(f.content), f.max)
		}
		out.file(f.entry, f.content)
	}
	out.write(header(eventsEntry, c.Events.Size))
	if again, err := e.events(ctx, c, tree, out); err != nil {
		return "", err
	} else if again != c.Events {
		return "", errors.New("the events changed while they were packed")
	}
	out.write(zeros[:padding(c.Events.Size)])
	for _, blobs := range [][]Blob{c.Manifests, c.Blobs} {
		for _, b := range blobs {
			if err := out.copy(b, e.Open); err != nil {
				return "", fmt.Errorf("%s: %w", blobEntry(b.Digest), err)
			}
		}
	}
	out.write(zeros[:])
	return id, out.w.Flush()
}

// list returns the list as it is written, and the tree of the checkpoint.
func (e Export) list(ctx context.Context) ([]byte, tlog.Tree, error) {
	key, err := openKey(e.VKey)
	if err != nil {
		return nil, tlog.Tree{}, err
	}
	checkpoint, err := taglog.Open(e.Checkpoint, key)
	if err != nil {
		return nil, tlog.Tree{}, fmt.Errorf("%s: %w", checkpointEntry, err)
	}
	c := e.Contents
	c.V, c.Origin, c.LogSize = version, checkpoint.Origin, checkpoint.N
	c.Checkpoint = Blob{digest.FromBytes(e.Checkpoint), int64(len(e.Checkpoint))}
	if c.Events, err = e.events(ctx, c, checkpoint.Tree, io.Discard); err != nil {
		return nil, tlog.Tree{}, err
	}
	list, err := c.encode()
	return list, checkpoint.Tree, err
}

// events writes the events with their proofs, and says what they are.
func (e Export) events(ctx context.Context, c Contents, tree tlog.Tree, w io.Writer) (Events, error) {
	h, err := newHistory(c, tree)
	if err != nil {
		return Events{}, err
	}
	var sum Events
	digester := digest.SHA256.Digester()
	w = io.MultiWriter(w, digester.Hash())
	for entry, err := range e.Events(ctx) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return Events{}, fmt.Errorf("read the events: %w", err)
		}
		proof, err := tlog.ProveRecord(tree.N, entry.Index, e.Hashes)
		if err != nil {
			return Events{}, fmt.Errorf("prove event %d: %w", entry.Index, err)
		}
		if err := h.add(entry, proof); err != nil {
			return Events{}, err
		}
		line, err := encodeLine(entry, proof)
		if err != nil {
			return Events{}, err
		}
		n, err := w.Write(line)
		if err != nil {
			return Events{}, err
		}
		sum.Count, sum.Size = sum.Count+1, sum.Size+int64(n)
	}
	sum.Digest = digester.Digest()
	return sum, h.end()
}

// sign returns the signature of the list, which must be by the key that is packed.
func (e Export) sign(id digest.Digest) ([]byte, error) {
	signature, err := sign(id, e.Signer)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", signatureEntry, err)
	}
	key, err := openKey(e.VKey)
	if err == nil {
		err = verify(signature, id, key)
	}
	return signature, err
}

// A writer writes entries one after the other. An error of w is told by whatever
// is written next, or by its Flush.
type writer struct {
	ctx context.Context
	w   *bufio.Writer // takes what is small together; pieces pass it by
	buf [piece]byte
}

func (w *writer) Write(p []byte) (int, error) { return w.w.Write(p) }

func (w *writer) write(p []byte) { w.w.Write(p) }

func (w *writer) file(entry string, content []byte) {
	w.write(header(entry, int64(len(content))))
	w.write(content)
	w.write(zeros[:padding(int64(len(content)))])
}

// copy writes the entry of b.
func (w *writer) copy(b Blob, open func(context.Context, digest.Digest) (io.ReadCloser, error)) error {
	rc, err := open(w.ctx, b.Digest)
	if err != nil {
		return err
	}
	defer rc.Close()
	in := &input{ctx: w.ctx, r: rc}
	digester := b.Digest.Algorithm().Digester()
	w.write(header(blobEntry(b.Digest), b.Size))
	if b.Size >= int64(w.w.Size()) {
		w.w.Flush() // so that nothing of it is copied behind the header
	}
	n, err := io.CopyBuffer(io.MultiWriter(w, digester.Hash()), io.LimitReader(in, b.Size), w.buf[:])
	switch {
	case err != nil:
		return err
	case n < b.Size:
		return fmt.Errorf("ends after %d of %d bytes", n, b.Size)
	case digester.Digest() != b.Digest:
		return fmt.Errorf("its %d bytes hash to %s", n, digester.Digest())
	}
	if more, err := io.ReadFull(in, w.buf[:1]); more > 0 {
		return fmt.Errorf("has more than %d bytes", b.Size)
	} else if err != io.EOF {
		return err
	}
	w.write(zeros[:padding(b.Size)])
	return nil
}
