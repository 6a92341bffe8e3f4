package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/proxy/upstream/upstreamtest"
)

// A receiver of webhooks notes what it took, by the ID of its message, and answers
// as it is told.
type receiver struct {
	mu     sync.Mutex
	events map[string][]string // by message, the subjects of its events
	order  []string            // messages, as they came first
	twice  map[string]string   // bodies
	wrong  []string
	tries  int
	tried  map[string]bool
	answer func(try int, again bool, w http.ResponseWriter) (taken bool)
	*httptest.Server
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{events: make(map[string][]string), twice: make(map[string]string), tried: make(map[string]bool)}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body, err := io.ReadAll(q.Body)
		if err != nil {
			return // it was killed
		}
		r.mu.Lock()
		r.tries++
		id := q.Header.Get("Webhook-Id")
		try, again, answer := r.tries, r.tried[id], r.answer
		r.tried[id] = true
		r.mu.Unlock()
		if answer(try, again, w) {
			r.take(id, body)
		}
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) take(id string, body []byte) {
	type event struct{ Subject, Sequence string }
	var list []event
	if body[0] == '[' {
		if err := json.Unmarshal(body, &list); err != nil {
			r.wrong = append(r.wrong, err.Error())
		}
	} else {
		var e event
		if err := json.Unmarshal(body, &e); err != nil {
			r.wrong = append(r.wrong, err.Error())
		}
		list = []event{e}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if before, again := r.twice[id]; again {
		if before != string(body) {
			r.wrong = append(r.wrong, id+" is another message the second time")
		}
		return
	}
	r.twice[id] = string(body)
	r.order = append(r.order, id)
	for _, e := range list {
		r.events[id] = append(r.events[id], e.Subject+" "+e.Sequence)
	}
}

// entries are all events that were taken, by the ID of their message each once.
func (r *receiver) entries() (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range r.order {
		out = append(out, r.events[id]...)
	}
	return out
}

// However often the server is killed, and whatever the receiver answers meanwhile,
// every move is told exactly once by the message's ID.
func TestKilledWhileOthersAreTold(t *testing.T) {
	up := upstreamtest.New()
	defer up.Close()
	r := newReceiver(t)
	r.answer = func(try int, again bool, w http.ResponseWriter) bool {
		if again || try%3 == 0 {
			return true // the next attempt but one would be in five minutes
		}
		w.WriteHeader(http.StatusInternalServerError)
		return try%3 == 1 // it has it, and says it does not
	}
	data := filepath.Join(t.TempDir(), "data")
	cfg := config(data, up.URL().String(), `audit: {preset: homelab, flap_window: 1ms}`, fmt.Sprintf(`notify: [{name: ops, type: webhook, url: %q, min_severity: notice, group_wait: 0s}]`, r.URL+"/hook"))
	tags, moves := []string{"a", "b", "c"}, 0
	for round := range 8 {
		s := serve(t, cfg)
		for _, tag := range tags {
			up.Push("library/app", tag, upstreamtest.NewImage(fmt.Sprint(tag, round)))
			resp, _, err := s.get("/v2/library/app/manifests/" + tag)
			if err != nil || resp.StatusCode != 200 {
				t.Fatal(resp, err)
			}
			if round > 0 {
				moves++
			}
		}
		if round > 2 {
			time.Sleep(time.Duration(round) * 20 * time.Millisecond)
		}
		s.kill()
		<-s.done
	}
	s := serve(t, cfg)
	until(t, func() bool { return len(r.entries()) >= moves })
	var metrics string
	until(t, func() bool {
		resp, err := http.Get(s.admin + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		metrics = string(b)
		return !strings.Contains(metrics, `tidemark_notify_outbox{sink="ops",state="pending"}`)
	})
	s.stop()
	got := r.entries()
	once := slices.Compact(slices.Sorted(slices.Values(got)))
	if len(got) != moves || len(once) != moves || len(r.wrong) > 0 {
		t.Errorf("%d of %d moves were told, %d of them different; %v", len(got), moves, len(once), r.wrong)
	}
	t.Logf("%d moves in %d messages, %d attempts", moves, len(r.order), r.tries)
}

// Receivers of every kind at once: what is told to one that is well is told once and soon,
// whatever the others do; each of these has every move once by the message's ID as soon
// as it takes it; nobody is sent elsewhere, and no pull waits for any of them.
func TestReceiversOfEveryKind(t *testing.T) {
	up := upstreamtest.New()
	defer up.Close()
	private := newReceiver(t)
	private.answer = func(int, bool, http.ResponseWriter) bool { return true }
	taken := func(int, bool, http.ResponseWriter) bool { return true }
	refuses := func(status int, head ...string) func(int, bool, http.ResponseWriter) bool {
		return func(_ int, again bool, w http.ResponseWriter) bool {
			if again {
				return true
			}
			for i := 0; i < len(head); i += 2 {
				w.Header().Set(head[i], head[i+1])
			}
			w.WriteHeader(status)
			return false
		}
	}
	release := make(chan struct{})
	defer close(release)
	kinds := map[string]func(int, bool, http.ResponseWriter) bool{
		"good": taken, "fails": refuses(500), "limits": refuses(429, "Retry-After", "7"),
		"gone": func(_ int, _ bool, w http.ResponseWriter) bool { w.WriteHeader(http.StatusGone); return false },
		"redirects": func(_ int, _ bool, w http.ResponseWriter) bool {
			w.Header().Set("Location", private.URL)
			w.WriteHeader(307)
			return false
		},
		"slow":  func(int, bool, http.ResponseWriter) bool { time.Sleep(time.Second); return true },
		"hangs": func(int, bool, http.ResponseWriter) bool { <-release; return false },
		"resets": func(_ int, again bool, w http.ResponseWriter) bool { // it has it, and nobody is told
			if c, _, err := http.NewResponseController(w).Hijack(); err == nil && !again {
				_ = c.Close()
			}
			return true
		},
	}
	receivers := make(map[string]*receiver)
	var sinks strings.Builder
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		r := newReceiver(t)
		r.answer = kinds[name]
		receivers[name] = r
		fmt.Fprintf(&sinks, "  - {name: %s, type: webhook, url: %q, min_severity: info, group_by: none, group_wait: 0s}\n", name, r.URL)
	}
	fmt.Fprintf(&sinks, "  - {name: down, type: webhook, url: \"http://127.0.0.1:1/\", min_severity: info, group_by: none, group_wait: 0s}\n")
	s := serve(t, config(filepath.Join(t.TempDir(), "data"), up.URL().String(), "audit: {preset: homelab}", "notify:\n"+sinks.String()))
	tags := []string{"a", "b", "c", "d"} // fewer failures than make a sink be left alone for a minute
	for _, name := range []string{"one", "two"} {
		for _, tag := range tags {
			up.Push("library/app", tag, upstreamtest.NewImage(name+tag))
			began := time.Now()
			resp, _, err := s.get("/v2/library/app/manifests/" + tag)
			if err != nil || resp.StatusCode != 200 {
				t.Fatal(resp, err)
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("a pull took %v", took)
			}
		}
	}
	for _, name := range []string{"good", "slow", "fails", "limits", "resets"} {
		r := receivers[name]
		until(t, func() bool { return len(r.entries()) >= len(tags) })
	}
	s.stop()
	for name, r := range receivers {
		got := r.entries()
		want := len(tags)
		if name == "gone" || name == "redirects" || name == "hangs" {
			want = 0
		}
		if once := slices.Compact(slices.Sorted(slices.Values(got))); len(got) != want || len(once) != want || len(r.wrong) > 0 {
			t.Errorf("%s has %v; %v", name, got, r.wrong)
		}
	}
	if n := receivers["gone"].tries; n > 4 { // as many as are under way at once
		t.Errorf("who is gone was told %d times", n)
	}
	if private.tries > 0 {
		t.Error("a redirect was followed")
	}
}

// A receiver that never answers costs a pull nothing: of hot manifests, pulled in
// turn from a server with one and from a server without any, the slowest take as long.
func BenchmarkHangingSink(b *testing.B) {
	up := upstreamtest.New()
	defer up.Close()
	hang := make(chan struct{})
	defer close(hang)
	r := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	r.Config.SetKeepAlivesEnabled(false)
	up.Push("library/app", "hot", upstreamtest.NewImage("hot"))
	start := func(more ...string) *server {
		s := serve(b, strings.Replace(config(filepath.Join(b.TempDir(), "data"), up.URL().String(), more...), "ttl: 0s", "ttl: 60s", 1))
		for i := range 200 { // moves, of all of which it is to be told
			up.Push("library/app", "m", upstreamtest.NewImage(fmt.Sprint(i)))
			req, err := http.NewRequest("GET", s.registry+"/v2/library/app/manifests/m", nil)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := http.DefaultClient.Do(req); err != nil {
				b.Fatal(err)
			}
		}
		return s
	}
	sinks := `notify: [{name: hangs, type: webhook, url: "` + r.URL + `", min_severity: info, group_by: none, group_wait: 0s}]`
	with, without := start("audit: {preset: homelab, flap_window: 1ms}", sinks), start("audit: {preset: homelab, flap_window: 1ms}")
	for b.Loop() {
		var took [2][]time.Duration
		for i := range 20_000 {
			s := []*server{with, without}[i%2]
			began := time.Now()
			resp, err := http.Get(s.registry + "/v2/library/app/manifests/hot")
			if err != nil {
				b.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			took[i%2] = append(took[i%2], time.Since(began))
		}
		p99 := func(d []time.Duration) float64 { slices.Sort(d); return float64(d[len(d)*99/100].Microseconds()) }
		b.ReportMetric(p99(took[0])/p99(took[1]), "p99-ratio")
		b.ReportMetric(p99(took[0]), "p99-us")
	}
}
