package disk_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
	"tidemark/cache/cachetest"
	"tidemark/cache/disk"
)

func open(t *testing.T, dir string) cache.Store {
	t.Helper()
	s, err := disk.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) { cachetest.Run(t, open) }

// Stray files, half-written ones and folders are passed over: nothing in the
// directory is a reason not to start.
func TestStrayFilesAreNoReasonNotToStart(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	good := digest.FromString("good")
	for _, name := range []string{
		"blobs/sha256/" + good.Encoded(),
		"blobs/sha256/lost+found",
		"blobs/sha256/" + good.Encoded()[:63],
		"blobs/sha256/" + good.Encoded() + ".tmp",
		"blobs/stray",
		"partial/stray",
		"partial/sha256-short",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("good"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "blobs/sha256", digest.FromString("dir").Encoded()), 0o755); err != nil {
		t.Fatal(err)
	}
	var found []cache.Entry
	for e, err := range open(t, dir).Walk(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, e)
	}
	if len(found) != 1 || found[0].Digest != good {
		t.Errorf("Walk found %v, want only %s", found, good)
	}
	if _, _, err := open(t, dir).Open(digest.FromString("dir")); err == nil {
		t.Error("a folder was opened as content")
	}
}
