package bundle_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"tidemark/audit/bundle"
)

// What packing and reading cost beside the hash of the content, from and to files.
func BenchmarkContent(b *testing.B) {
	const size = 64 << 20
	w := newWorld()
	content := bytes.Repeat([]byte("content "), size/8)
	path := filepath.Join(b.TempDir(), "blob")
	if err := os.WriteFile(path, content, 0o644); err != nil {
		b.Fatal(err)
	}
	d := digest.FromBytes(content)
	e := w.full
	e.Contents.Blobs = append(e.Contents.Blobs, bundle.Blob{Digest: d, Size: size})
	e.Open = func(ctx context.Context, asked digest.Digest) (io.ReadCloser, error) {
		if asked == d {
			return os.Open(path)
		}
		return w.content.open(ctx, asked)
	}
	packed := path + ".tar"
	b.Run("hash", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			digest.FromBytes(content)
		}
	})
	b.Run("write", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			f, err := os.Create(packed)
			if err == nil {
				_, err = bundle.Write(b.Context(), f, e)
			}
			if err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	})
	b.Run("read", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			f, err := os.Open(packed)
			if err == nil {
				_, err = bundle.Read(b.Context(), f, checks())
			}
			if err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	})
}
