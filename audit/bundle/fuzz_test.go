package bundle_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/audit/bundle"
)

// Whatever is read, it does not panic, and nothing is accepted but what the holder of
// the key has packed.
func FuzzRead(f *testing.F) {
	var packed [][]byte
	for _, name := range []string{"full.tar", "delta.tar"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		packed = append(packed, b)
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	small, _ := pack(f, newWorld().small())
	packed = append(packed, small)
	f.Add(small)
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := bundle.Read(t.Context(), bytes.NewReader(b), checks())
		if err == nil && !slices.ContainsFunc(packed, func(p []byte) bool { return bytes.Equal(p, b) }) {
			t.Error("a bundle that nobody has packed was accepted")
		}
	})
}

// Whatever the holder of the key signs, it does not panic, and what is accepted is
// what Write makes of it, byte for byte.
func FuzzSigned(f *testing.F) {
	w := newWorld()
	for _, e := range []bundle.Export{w.full, w.delta, w.small()} {
		packed, _ := pack(f, e)
		entries := unpack(f, packed)
		at := bytes.Index(packed, []byte("blobs/"))
		f.Add(entries[2].body, entries[6].body, packed[at:])
	}
	f.Fuzz(func(t *testing.T, list, events, rest []byte) {
		checkpoint, index := w.full.Checkpoint, []byte("{}")
		var c bundle.Contents
		if json.Unmarshal(list, &c) == nil {
			index = c.Index()
			if c.Checkpoint.Digest == digest.FromBytes(w.delta.Checkpoint) {
				checkpoint = w.delta.Checkpoint
			}
		}
		head := repack(t, []entry{
			file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`),
			file("index.json", string(index)),
			file("tidemark/contents.json", string(list)),
			file("tidemark/contents.sig", string(signNote(t, list, logKey))),
			file("tidemark/vkey", logKey.VKey+"\n"),
			file("tidemark/checkpoint", string(checkpoint)),
			file("tidemark/events.jsonl", string(events)),
		})
		packed := append(head[:len(head)-2*block], rest...)
		c, content, entries, err := read(t.Context(), packed)
		if err != nil {
			return
		}
		var again bytes.Buffer
		_, err = bundle.Write(t.Context(), &again, bundle.Export{
			Contents: c, Checkpoint: checkpoint, VKey: logKey.VKey, Signer: logKey.Signer, Hashes: w.log,
			Events: func(context.Context) iter.Seq2[audit.Entry, error] {
				return func(yield func(audit.Entry, error) bool) {
					for _, e := range entries {
						if !yield(e, nil) {
							return
						}
					}
				}
			},
			Open: func(_ context.Context, d digest.Digest) (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(content[d])), nil
			},
		})
		if err != nil || !bytes.Equal(again.Bytes(), packed) {
			t.Errorf("what was accepted is not what Write makes of it: %v", err)
		}
	})
}
