package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/audit/audittest"
	"tidemark/proxy/upstream/upstreamtest"
)

// A tag that moves while nobody pulls is in the ledger soon after, found by one HEAD
// and fetched by one GET.
func TestMoveIsNoticedThoughNobodyPulls(t *testing.T) {
	up := upstreamtest.New()
	defer up.Close()
	up.Push("library/app", "1", upstreamtest.NewImage("one"))
	up.Push("library/app", "2", upstreamtest.NewImage("two"))
	data := filepath.Join(t.TempDir(), "data")
	s := serve(t, config(data, up.URL().String(), `watch: {refs: ["docker.io/library/app:*"], interval: 50ms, floor: 50ms, ceiling: 50ms, seen: false}`))
	type list struct {
		Events []struct {
			Leaf struct {
				Type     string
				Evidence struct{ Trigger string }
			}
		}
	}
	events := func() (l list) { s.getJSON("/api/v1/events", &l); return l }
	until(t, func() bool { return len(events().Events) == 2 })
	up.Reset()
	up.Push("library/app", "1", upstreamtest.NewImage("moved"))
	until(t, func() bool { return len(events().Events) == 3 })
	if last := events().Events[2].Leaf; last.Type != "tag.moved" || last.Evidence.Trigger != "poll" {
		t.Errorf("recorded: %+v", last)
	}
	for _, r := range up.Requests() {
		if r.Method == http.MethodGet && !strings.Contains(r.Path, "sha256:") {
			t.Errorf("a tag was asked about with %s %s", r.Method, r.Path)
		}
	}
	s.stop()
}

// until waits for something that happens on its own.
func until(t *testing.T, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !happened(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen within 30 s")
		}
	}
}

// Ten thousand tags that are all overdue are asked about with HEAD alone, never more
// than 200 in a minute, in less than 100 MiB; and when upstream says that three
// tenths of its limit are left, the rest is for clients.
func TestTenThousandTagsAreWatchedPolitely(t *testing.T) {
	const refs = 10_000
	var mu sync.Mutex
	asked, limited := make(map[string]int), false
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked[r.Method]++
		var n int
		if _, err := fmt.Sscanf(r.URL.Path, "/v2/library/app%d/manifests/1", &n); err != nil {
			http.NotFound(w, r)
			return
		}
		if w.Header().Set("Ratelimit-Limit", "100;w=21600"); limited {
			w.Header().Set("Ratelimit-Remaining", "30;w=21600")
		} else {
			w.Header().Set("Ratelimit-Remaining", "90;w=21600")
		}
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Docker-Content-Digest", audittest.Digest(fmt.Sprint(n, 0)).String())
	}))
	defer up.Close()
	data := filepath.Join(t.TempDir(), "data")
	makeLedger(t, data, refs, refs)
	s := serve(t, config(data, up.URL, `watch: {refs: ["docker.io/library/app*:1"], interval: 1s, floor: 1s, ceiling: 1s, seen: false}`))
	count := func() int { mu.Lock(); defer mu.Unlock(); return asked["HEAD"] }
	began := time.Now()
	until(t, func() bool { return count() >= 20 })
	if took := time.Since(began); took < 5*time.Second {
		t.Errorf("20 questions within %v are more than 200 a minute", took)
	}
	mu.Lock()
	limited = true
	mu.Unlock()
	before := count()
	until(t, func() bool { return count() > before })
	time.Sleep(time.Second) // what was on its way; then nothing may come for five minutes
	before = count()
	time.Sleep(3 * time.Second)
	if after := count(); after > before+1 {
		t.Errorf("%d questions although the rest of the limit is for clients", after-before)
	}
	mu.Lock()
	for method, n := range asked {
		if method != "HEAD" {
			t.Errorf("%d times %s", n, method)
		}
	}
	mu.Unlock()
	if rss := residentMiB(t, s.cmd.Process.Pid); rss >= 100 {
		t.Errorf("it has %.0f MiB", rss)
	} else {
		t.Logf("%.0f MiB", rss)
	}
	s.stop()
}
