package e2e

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/proxy/admin"
	"tidemark/proxy/upstream/upstreamtest"
)

// sound checks that whatever stands under a digest in a data folder is its
// content.
func sound(t *testing.T, data string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(data, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if digest.FromBytes(b).Encoded() != filepath.Base(f) {
			t.Errorf("%s holds other content", f)
		}
	}
}

// arrived is how much of a download is in partial/.
func arrived(data string) int64 {
	files, err := filepath.Glob(filepath.Join(data, "partial/*"))
	if err != nil || len(files) != 1 {
		return 0
	}
	info, err := os.Stat(files[0])
	if err != nil {
		return 0
	}
	return info.Size()
}

// A server that is killed while a layer arrives leaves nothing wrong: the next
// one resumes what was there, and the client gets the right bytes.
func TestKilledDuringAFill(t *testing.T) {
	up := upstreamtest.New()
	defer up.Close()
	layer := strings.Repeat("0123456789abcdef", 500_000)
	img := upstreamtest.NewImage(layer)
	path := img.Layers[0].Digest.String()
	up.Push("library/app", "1", img)
	data := filepath.Join(t.TempDir(), "data")
	for _, at := range []int64{1, 1_000_000, 4_000_000, 7_999_999} {
		up.Break(upstreamtest.Fault{Name: upstreamtest.Stall, Path: path, At: at, Times: 1})
		s := serve(t, config(data, up.URL().String()))
		resp, err := http.Get(s.registry + "/v2/library/app/blobs/" + path)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 1)
		if n, err := io.ReadFull(resp.Body, got[:min(1, at-1)]); err != nil {
			t.Fatalf("read %d bytes of a fill that has %d: %v", n, at, err)
		}
		for deadline := time.Now().Add(10 * time.Second); arrived(data) < at && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		s.kill()
		if _, err := io.ReadAll(resp.Body); err == nil {
			t.Error("the client of a killed server got a whole body")
		}
		resp.Body.Close()
		sound(t, data)
		up.Reset()
		up.Release()
	}
	s := serve(t, config(data, up.URL().String()))
	resp, body, err := s.get("/v2/library/app/blobs/" + path)
	if err != nil || resp.StatusCode != 200 || string(body) != layer {
		t.Fatalf("after four kills: %d bytes, %v", len(body), err)
	}
	if sent := up.Sent(path); sent >= int64(len(layer)) {
		t.Errorf("upstream sent %d bytes again, want only what was missing", sent)
	}
	s.stop()
	sound(t, data)
}

// A move is in the ledger when the client has the new digest: also if the
// server is killed the moment the answer is there.
func TestMoveSurvivesAKillAfterTheAnswer(t *testing.T) {
	up := upstreamtest.New()
	defer up.Close()
	data := filepath.Join(t.TempDir(), "data")
	for i := range 8 {
		img := upstreamtest.NewImage(strings.Repeat("x", i+1))
		up.Push("library/app", "1", img)
		s := serve(t, config(data, up.URL().String()))
		resp, err := http.Head(s.registry + "/v2/library/app/manifests/1")
		s.kill()
		if err != nil || resp.Header.Get("Docker-Content-Digest") != img.Manifest.Digest.String() {
			t.Fatalf("pull %d: %v, %v", i, resp, err)
		}
		s = serve(t, config(data, up.URL().String()))
		var list admin.TagList
		s.getJSON("/api/v1/tags", &list)
		if len(list.Tags) != 1 || list.Tags[0].Head != img.Manifest.Digest || list.Tags[0].Index != int64(i) {
			t.Errorf("after kill %d the ledger says %+v, want %s", i, list, img.Manifest.Digest)
		}
		s.verified(i + 1)
		up.Close() // and it is served without upstream, from what was stored
		resp2, body, err := s.get("/v2/library/app/manifests/1")
		if err != nil || resp2.StatusCode != 200 || !bytes.Equal(body, img.Manifest.Body) {
			t.Errorf("without upstream: %v, %v", resp2, err)
		}
		s.kill()
		up = upstreamtest.New()
	}
	sound(t, data)
}

// A second server on the same data folder refuses to start, and says who has it.
func TestSecondServerIsRefused(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	s := serve(t, config(data, "http://127.0.0.1:1"))
	out, code := s.run("serve", "--data", data, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
	if code != 1 || out != "" {
		t.Errorf("second server: exit %d, %q", code, out)
	}
	if holder, err := os.ReadFile(filepath.Join(data, "lock.holder")); err != nil || !strings.Contains(string(holder), "process ") {
		t.Errorf("lock says %q, %v", holder, err)
	}
	s.stop()
	serve(t, config(data, "http://127.0.0.1:1")).stop()
}
