package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// made is content that is made while it is read: of a size, from a seed.
func made(seed uint64, size int64) io.Reader {
	var key [32]byte
	copy(key[:], strconv.FormatUint(seed, 10))
	return io.LimitReader(rand.NewChaCha8(key), size)
}

// A maker is a registry whose images have one large layer each, which is made when it
// is asked for.
type maker struct {
	manifests, configs map[string][]byte // by digest
	tags               map[string]string
	layers             map[string]uint64
	size               int64
}

func newMaker(images int, size int64) *maker {
	m := &maker{manifests: make(map[string][]byte), configs: make(map[string][]byte), tags: make(map[string]string), layers: make(map[string]uint64), size: size}
	config := []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`)
	m.configs[digestOf(config)] = config
	for i := range images {
		hash := sha256.New()
		_, _ = io.Copy(hash, made(uint64(i), size)) // neither fails
		layer := fmt.Sprintf("sha256:%x", hash.Sum(nil))
		m.layers[layer] = uint64(i)
		manifest := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":%d}]}`,
			digestOf(config), len(config), layer, size)
		m.manifests[digestOf(manifest)] = manifest
		m.tags[strconv.Itoa(i)] = digestOf(manifest)
	}
	return m
}

func digestOf(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

func (m *maker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, reference, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/library/app/"), "/")
	if d, ok := m.tags[reference]; ok {
		reference = d
	}
	seed, layer := m.layers[reference]
	switch {
	case m.manifests[reference] != nil:
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Docker-Content-Digest", reference)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(m.manifests[reference]))
	case m.configs[reference] != nil:
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(m.configs[reference]))
	case layer:
		var off int64
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &off); err == nil && off > 0 {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, m.size-1, m.size))
		}
		w.Header().Set("Content-Length", strconv.FormatInt(m.size-off, 10))
		if off > 0 {
			w.WriteHeader(http.StatusPartialContent)
		}
		content := made(seed, m.size)
		_, _ = io.CopyN(io.Discard, content, off) // it does not fail
		_, _ = io.Copy(w, content)                // a client that is gone needs none
	default:
		http.NotFound(w, r)
	}
}

var peak = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

// peakMiB is the most memory that a process had, in MiB.
func peakMiB(t testing.TB, pid int) float64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := peak.FindSubmatch(b)
	if m == nil {
		t.Fatalf("no peak in %s", b)
	}
	kb, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return kb / 1024
}

// timed runs a program and returns how long it took, in seconds, and its peak memory in
// MiB.
func timed(b *testing.B, server, program string, args ...string) (seconds, mib float64) {
	b.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "TIDEMARK_SERVER="+server)
	began := time.Now()
	out, err := cmd.CombinedOutput()
	seconds = time.Since(began).Seconds()
	if err != nil {
		b.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return seconds, maxRSS(cmd.ProcessState)
}

// A bundle of 5 GiB of made content (TIDEMARK_BUNDLE_GIB for another size) is exported,
// copied and hashed with cp and sha256sum, and imported elsewhere, in turn, twice. The
// ratios are how fast tidemark is: cp and sha256sum, divided by it.
func BenchmarkBundle(b *testing.B) {
	gib := 5
	if s := os.Getenv("TIDEMARK_BUNDLE_GIB"); s != "" {
		var err error
		if gib, err = strconv.Atoi(s); err != nil {
			b.Fatal(err)
		}
	}
	up := httptest.NewServer(newMaker(gib, 1<<30))
	defer up.Close()
	dir := b.TempDir()
	from := serve(b, config(filepath.Join(dir, "from"), up.URL))
	var refs []string
	for i := range gib {
		refs = append(refs, fmt.Sprintf("docker.io/library/app:%d", i))
	}
	if out, code := from.run(append([]string{"warm"}, refs...)...); code != 0 {
		b.Fatal(out)
	}
	from.stop() // its peak is that of the fills
	from = serve(b, config(filepath.Join(dir, "from"), up.URL))
	tar, vkey := filepath.Join(dir, "bundle.tar"), filepath.Join(dir, "from", "log.vkey")
	var exported, imported, copied, most float64
	for round := range 2 {
		seconds, mib := timed(b, from.admin, binary, append([]string{"export", "-o", tar}, refs...)...)
		exported, most = exported+seconds, max(most, mib)
		seconds, _ = timed(b, "", "sh", "-c", fmt.Sprintf("cp %[1]s %[1]s.copy && sha256sum %[1]s.copy >/dev/null", tar))
		copied += seconds
		if err := os.Remove(tar + ".copy"); err != nil {
			b.Fatal(err)
		}
		data := filepath.Join(dir, fmt.Sprint("to", round))
		to := serve(b, config(data, up.URL), "--offline")
		seconds, mib = timed(b, to.admin, binary, "import", "--trust", vkey, tar)
		imported, most = imported+seconds, max(most, mib, peakMiB(b, to.cmd.Process.Pid))
		to.stop()
		if err := os.RemoveAll(data); err != nil {
			b.Fatal(err)
		}
	}
	most = max(most, peakMiB(b, from.cmd.Process.Pid))
	b.ReportMetric(copied/exported, "export/cp+sha256")
	b.ReportMetric(copied/imported, "import/cp+sha256")
	b.ReportMetric(2*float64(gib)*1024/copied, "MiB/s-cp+sha256")
	b.ReportMetric(most, "peak-MiB")
	b.ReportMetric(0, "ns/op")
	if most > 150 {
		b.Errorf("a peak of %.0f MiB", most)
	}
}
