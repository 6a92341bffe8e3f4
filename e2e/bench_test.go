package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/proxy/upstream/upstreamtest"
)

// The figures of docs/measuring.md:
//
//	go test -run '^$' -bench . ./e2e

// A GET of a manifest that is here, by tag within tags.ttl and by digest.
func BenchmarkHotManifest(b *testing.B) {
	up := upstreamtest.New()
	defer up.Close()
	img := upstreamtest.NewImage("layer")
	up.Push("library/app", "1", img)
	conf := strings.Replace(config(filepath.Join(b.TempDir(), "data"), up.URL().String()), "ttl: 0s", "ttl: 1h", 1)
	s := serve(b, conf)
	for _, ref := range []string{"1", img.Manifest.Digest.String()} {
		b.Run(ref[:1], func(b *testing.B) {
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				c := &http.Client{Transport: &http.Transport{}}
				for pb.Next() {
					fetch(b, c, s.registry+"/v2/library/app/manifests/"+ref, int64(len(img.Manifest.Body)))
				}
			})
		})
	}
}

// fetch reads a body and throws it away.
func fetch(b *testing.B, c *http.Client, url string, size int64) {
	resp, err := c.Get(url)
	if err != nil {
		b.Error(err)
		return
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != size {
		b.Errorf("%s = %s with %d bytes, %v", url, resp.Status, n, err)
	}
}

// A GET of a blob of 256 MiB that is here, by one client.
func BenchmarkHotBlob(b *testing.B) {
	up, path, size := coldBlob(b, 256<<20)
	s := serve(b, config(filepath.Join(b.TempDir(), "data"), up.URL().String()))
	fetch(b, http.DefaultClient, s.registry+path, size)
	b.SetBytes(size)
	for b.Loop() {
		fetch(b, http.DefaultClient, s.registry+path, size)
	}
}

// 64 clients pull the same cold blob of 256 MiB at once, through tidemark and
// directly, in turn, from an upstream that gives each connection 200 MB/s. The
// ratio is what tidemark costs. GOMAXPROCS in the environment is tidemark's too.
func BenchmarkHerd(b *testing.B) {
	up, path, size := coldBlob(b, 256<<20)
	slow := httptest.NewServer(paced{up, 200e6})
	defer slow.Close()
	herd := func(address string) time.Duration {
		began := time.Now()
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() { fetch(b, &http.Client{Transport: &http.Transport{}}, address+path, size) })
		}
		wg.Wait()
		return time.Since(began)
	}
	var direct, through time.Duration
	var sent int64
	for b.Loop() {
		direct += herd(slow.URL)
		s := serve(b, config(filepath.Join(b.TempDir(), "data"), slow.URL))
		up.Reset()
		through += herd(s.registry)
		sent += up.Sent(path)
		s.kill()
	}
	b.ReportMetric(through.Seconds()/direct.Seconds(), "×direct")
	b.ReportMetric(float64(sent)/float64(size)/float64(b.N), "fetched/size")
}

// paced is a registry whose connections have a rate, in bytes a second.
type paced struct {
	up   *upstreamtest.Registry
	rate float64
}

func (p paced) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.up.ServeHTTP(&pacedWriter{w, p.rate, time.Now(), 0}, r)
}

type pacedWriter struct {
	http.ResponseWriter
	rate  float64
	began time.Time
	sent  int
}

func (w *pacedWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		time.Sleep(time.Until(w.began.Add(time.Duration(float64(w.sent) / w.rate * 1e9))))
		var m int
		m, err = w.ResponseWriter.Write(p[:min(len(p), 1<<20)])
		n, w.sent, p = n+m, w.sent+m, p[m:]
	}
	return n, err
}

func coldBlob(b *testing.B, size int) (up *upstreamtest.Registry, path string, n int64) {
	up = upstreamtest.New()
	b.Cleanup(up.Close)
	img := upstreamtest.NewImage(strings.Repeat("0123456789abcdef", size/16))
	up.Push("library/app", "1", img)
	return up, "/v2/library/app/blobs/" + img.Layers[0].Digest.String(), int64(size)
}

// The time from the start of the process to its first cached blob, with 100,000
// blobs in the cache.
func BenchmarkStartWith100000Blobs(b *testing.B) {
	data := filepath.Join(b.TempDir(), "data")
	dir := filepath.Join(data, "blobs/sha256")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	var name string
	for i := range 100_000 {
		content := fmt.Appendf(nil, "blob %d", i)
		sum := sha256.Sum256(content)
		name = hex.EncodeToString(sum[:])
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	for b.Loop() {
		s := serve(b, config(data, "http://127.0.0.1:1"))
		fetch(b, http.DefaultClient, s.registry+"/v2/library/app/blobs/sha256:"+name, int64(len("blob 99999")))
		b.StopTimer()
		s.kill()
		b.StartTimer()
	}
}
