package e2e

import (
	"bufio"
	"database/sql"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/sqlite"
	"tidemark/audit/taglog"
	"tidemark/proxy/admin"
	"tidemark/proxy/upstream/upstreamtest"
)

// A rule holds a tag. Upstream moves it and deletes the old image, and Docker
// goes on pulling the old one, bytes and all; what changed can be read; an operator
// approves with a reason, the next pull gets the new one, and the ledger verifies.
func TestDockerPullsWhatIsHeld(t *testing.T) {
	up := startRegistry(t)
	data := filepath.Join(t.TempDir(), "data")
	conf := config(data, up.URL, `audit: {rules: [{name: careful, match: "docker.io/library/*:1", mode: hold}]}`)
	s := serve(t, conf)
	setup, code := s.run("setup", "docker", "--registry", s.registry)
	if code != 0 {
		t.Fatal(setup)
	}
	d := startDocker(t, setup[strings.Index(setup, "{"):strings.Index(setup, "}")+1])
	base := image(t, empty.Image, 3)
	old := up.push(t, "library/app:1", image(t, base, 1))
	d.pull(old)
	moved := up.push(t, "library/app:1", image(t, base, 1))
	d.run("rmi", "app:1")
	d.pull(old)
	ref, err := name.ParseReference(up.addr+"/library/app@"+old, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Delete(ref); err != nil {
		t.Fatal(err)
	}
	d.run("rmi", "app:1")
	up.reset()
	d.pull(old)
	if n := up.count("/blobs/"); n != 0 {
		t.Errorf("the pull of what is held made %d blob requests upstream, want none", n)
	}
	diff, code := s.run("diff", "app:1")
	for _, want := range []string{"old  " + old, "new  " + moved, "layers   3 shared, 1 gone, 1 new"} {
		if code != 0 || !strings.Contains(diff, want) {
			t.Errorf("tidemark diff does not say %q:\n%s", want, diff)
		}
	}
	if out, code := s.run("approve", "app:1", moved, "--reason", "release notes read"); code != 0 || !strings.Contains(out, moved) {
		t.Errorf("approve: %d %s", code, out)
	}
	d.run("rmi", "app:1")
	d.pull(moved)
	log, _ := s.run("log", "app:1")
	for _, want := range []string{"tag.held", "tag.released", "release notes read"} {
		if !strings.Contains(log, want) {
			t.Errorf("tidemark log does not say %q:\n%s", want, log)
		}
	}
	who, _ := s.run("exposure", old, "--json")
	var x admin.Exposure
	if err := json.Unmarshal([]byte(who), &x); err != nil || x.Total != 1 || x.Clients[0].Client != "127.0.0.1" || x.Clients[0].Refs[0] != "docker.io/library/app:1" || x.Clients[0].Resolves < 3 {
		t.Errorf("exposure of the old image: %s", who)
	}
	s.verified(5)
	s.stop()
	sound(t, data)
}

// Fifty tags move at once from sixteen clients, and the server is killed twenty
// times in between: each time the log verifies, without a hole, and everything
// that a client was told is in it.
func TestKilledWhileManyTagsMove(t *testing.T) {
	up := upstreamtest.New()
	defer up.Close()
	data := filepath.Join(t.TempDir(), "data")
	const refs, clients, kills = 50, 16, 20
	var mu sync.Mutex
	told := make(map[string]map[string]bool) // by tag, the digests that clients were told
	for i := range refs {
		told[fmt.Sprint(i)] = make(map[string]bool)
	}
	for round := range kills {
		s := serve(t, config(data, up.URL().String()))
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for c := range clients {
			wg.Go(func() {
				client := &http.Client{Transport: &http.Transport{}}
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					tag := fmt.Sprint((c*7 + n) % refs)
					up.PushManifest("library/app", tag, upstreamtest.NewImage(fmt.Sprintf("%d %d %d", round, c, n)).Manifest)
					resp, err := client.Head(s.registry + "/v2/library/app/manifests/" + tag)
					if err != nil {
						return // killed
					}
					resp.Body.Close()
					if resp.StatusCode == 200 {
						mu.Lock()
						told[tag][resp.Header.Get("Docker-Content-Digest")] = true
						mu.Unlock()
					}
				}
			})
		}
		time.Sleep(time.Duration(50+20*round) * time.Millisecond)
		s.kill()
		close(stop)
		wg.Wait()
		inTheLog(t, data, told)
	}
	s := serve(t, config(data, up.URL().String()))
	if out, code := s.run("verify"); code != 0 {
		t.Errorf("verify: %d %s", code, out)
	}
	s.stop()
}

// inTheLog checks the whole log of a server that is not running, and that what
// clients were told is in it.
func inTheLog(t *testing.T, data string, told map[string]map[string]bool) {
	t.Helper()
	store, err := sqlite.Open(t.Context(), filepath.Join(data, "audit.db"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	seen := make(map[string]map[string]bool)
	for _, e := range audittest.Check(t, store) {
		if !e.Type.Moves() {
			continue
		}
		if seen[e.Ref.Tag] == nil {
			seen[e.Ref.Tag] = make(map[string]bool)
		}
		seen[e.Ref.Tag][e.New.Digest.String()] = true
	}
	for tag, digests := range told {
		for d := range digests {
			if !seen[tag][d] {
				t.Errorf("a client was told that %s means %s, and the log does not know", tag, d)
			}
		}
	}
}

// Other people's verifier of tiled logs, that of Tessera, finds nothing wrong.
func TestTesseraChecksTheLog(t *testing.T) {
	fsck := need(t, "tessera-fsck")
	up := upstreamtest.New()
	defer up.Close()
	data := filepath.Join(t.TempDir(), "data")
	s := serve(t, config(data, up.URL().String()))
	for i := range 300 { // beyond a full tile
		up.PushManifest("library/app", "1", upstreamtest.NewImage(fmt.Sprint(i)).Manifest)
		if resp, err := http.Head(s.registry + "/v2/library/app/manifests/1"); err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
	}
	s.verified(300)
	out, err := exec.Command(fsck, "--ui=false", "--storage_url", s.admin+"/log/", "--public_key", filepath.Join(data, "log.vkey")).CombinedOutput()
	if err != nil {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}

// The figures of a large ledger, docs/measuring.md:
//
//	go test -run '^$' -bench LargeLedger -benchtime 1x ./e2e
func BenchmarkLargeLedger(b *testing.B) {
	data := filepath.Join(b.TempDir(), "data")
	refs, events := 100_000, 1_000_000
	makeLedger(b, data, refs, events)
	for b.Loop() {
		began := time.Now()
		s := serve(b, config(data, "http://127.0.0.1:1"))
		b.ReportMetric(float64(time.Since(began).Milliseconds()), "start-ms")
		slowest := func(name string, paths ...string) {
			var worst time.Duration
			for _, p := range paths {
				began := time.Now()
				resp, err := http.Get(s.admin + p)
				if err != nil || resp.StatusCode != 200 {
					b.Fatalf("%s: %v, %v", p, resp, err)
				}
				var v any
				if err := json.NewDecoder(resp.Body).Decode(&v); err != nil && name != "proof" {
					b.Fatal(err)
				}
				resp.Body.Close()
				worst = max(worst, time.Since(began))
			}
			b.ReportMetric(float64(worst.Microseconds())/1000, name+"-ms")
		}
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			var st admin.Status
			resp, err := http.Get(s.admin + "/api/v1/status")
			if err != nil {
				b.Fatal(err)
			}
			if err := json.NewDecoder(resp.Body).Decode(&st); err != nil {
				b.Fatal(err)
			}
			resp.Body.Close()
			if st.Log.SignedSize == int64(events) && st.Cache.Indexed { // what is pinned was looked at, too
				break
			}
			if time.Now().After(deadline) {
				b.Fatalf("%d of %d entries are signed", st.Log.SignedSize, events)
			}
		}
		slowest("tags", "/api/v1/tags", "/api/v1/tags?after=docker.io/library/app50000:1", "/api/v1/tags?limit=1000", "/api/v1/tags?match=docker.io/library/app99999:*", "/api/v1/tags?held=true")
		slowest("events", "/api/v1/events", "/api/v1/events?order=desc", "/api/v1/events?after=500000&limit=1000", "/api/v1/events?type=tag.reverted&order=desc", "/api/v1/events?since=2026-06-23T00:00:00Z", "/api/v1/events?since=2026-06-23T00:00:00Z&order=desc", "/api/v1/events?since=2026-03-01T00:00:00Z&order=desc")
		slowest("history", "/api/v1/tags/history?ref=docker.io/library/app0:1", "/api/v1/tags/history?ref=docker.io/library/app50000:1", "/api/v1/tags/history?ref=docker.io/library/app99999:1")
		slowest("proof", "/log/proof/0", "/log/proof/500000", "/log/proof/999999")
		rss := residentMiB(b, s.cmd.Process.Pid)
		b.ReportMetric(rss, "RSS-MiB")
		s.stop()
	}
}

// makeLedger writes the ledger of refs that moved, until there are so many events.
// It writes the rows itself, in one transaction: a million of them that survive a
// power cut each would take the better part of an hour.
func makeLedger(b testing.TB, data string, refs, events int) {
	b.Helper()
	check := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	check(os.MkdirAll(data, 0o755))
	path := filepath.Join(data, "audit.db")
	store, err := sqlite.Open(b.Context(), path, "tidemark.test/large") // makes the tables
	check(err)
	check(store.Close())
	_, err = audit.OpenKey(data, "tidemark.test/large", true)
	check(err)
	db, err := sql.Open("sqlite", "file:"+path)
	check(err)
	defer db.Close()
	tx, err := db.Begin()
	check(err)
	prepare := func(query string) *sql.Stmt {
		stmt, err := tx.Prepare(query)
		check(err)
		return stmt
	}
	ref := prepare("INSERT INTO ref (id, upstream, repository, tag) VALUES (?, 'docker.io', ?, '1')")
	leaf := prepare("INSERT INTO log_leaf (idx, event_id, type, ref_id, at, body) VALUES (?, ?, ?, ?, ?, ?)")
	hash := prepare("INSERT INTO log_hash (pos, hash) VALUES (?, ?)")
	end := prepare("UPDATE tag_interval SET ended = ?, end_reason = ?, end_event = ? WHERE ref_id = ? AND ended IS NULL")
	begin := prepare("INSERT INTO tag_interval (ref_id, digest, media_type, size, first_seen, last_confirmed, leaf_idx, basis) VALUES (?, ?, '', 7, ?, ?, ?, 'observed')")
	state := prepare(`INSERT INTO tag_state (ref_id, head_digest, head_media_type, head_size, head_since, last_confirmed, served_digest, leaf_idx, more) VALUES (?, ?, '', 7, ?, ?, ?, ?, ?)`)
	var (
		policy *audit.Policy
		hashes []tlog.Hash
		tree   tlog.Tree
		states = make([]audit.State, refs)
		start  = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	)
	stored := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			out[i] = hashes[x]
		}
		return out, nil
	})
	for i := range events {
		n, at := i%refs, start.Add(time.Duration(i)*15*time.Second)
		r := audit.Ref{Upstream: "docker.io", Repository: fmt.Sprintf("library/app%d", n), Tag: "1"}
		seen := audit.Observation{Digest: audittest.Digest(fmt.Sprint(n, i/refs)), Size: 7}
		st, es := policy.Next(r, audit.Record{State: states[n]}, seen, at)
		audit.Identify(&st, es)
		body, err := es[0].Leaf()
		check(err)
		hs, t, err := taglog.Append(tree.N, body, stored)
		check(err)
		if i < refs {
			_, err = ref.Exec(n+1, r.Repository)
			check(err)
		}
		_, err = leaf.Exec(i, es[0].ID.String(), string(es[0].Type), n+1, at.UnixMilli(), body)
		check(err)
		for j, h := range hs {
			_, err = hash.Exec(len(hashes)+j, h[:])
			check(err)
		}
		_, err = end.Exec(at.UnixMilli(), string(es[0].Type), es[0].ID.String(), n+1)
		check(err)
		_, err = begin.Exec(n+1, st.Head, at.UnixMilli(), at.UnixMilli(), i)
		check(err)
		st.Index = int64(i)
		hashes, tree, states[n] = append(hashes, hs...), t, st
	}
	for n, st := range states {
		more, err := json.Marshal(st)
		check(err)
		_, err = state.Exec(n+1, st.Head, st.HeadSince.UnixMilli(), st.LastConfirmed.UnixMilli(), st.Served, st.Index, string(more))
		check(err)
	}
	_, err = tx.Exec("UPDATE log_state SET size = ?, root = ?", tree.N, tree.Hash[:])
	check(err)
	check(tx.Commit())
}

// residentMiB is the memory of a process as the kernel counts it.
func residentMiB(b testing.TB, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Skip("no /proc")
	}
	for line := range strings.Lines(string(status)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, "VmHWM: %f kB", &kib); n == 1 {
			return kib / 1024
		}
	}
	return 0
}

// Whoever follows the log sees every event once, in order, also those that were
// recorded while the connection was gone.
func TestFollowedLogGoesOnOverARestart(t *testing.T) {
	up := upstreamtest.New()
	defer up.Close()
	cfg := strings.Replace(config(filepath.Join(t.TempDir(), "data"), up.URL().String()), `admin: {listen: "127.0.0.1:0"}`, fmt.Sprintf("admin: {listen: %q}", freeAddr(t)), 1)
	s := serve(t, cfg)
	moves := 0
	move := func() {
		t.Helper()
		moves++
		up.Push("library/app", "1", upstreamtest.NewImage(fmt.Sprint(moves)))
		if resp, _, err := s.get("/v2/library/app/manifests/1"); err != nil || resp.StatusCode != 200 {
			t.Fatalf("pull: %v, %v", resp, err)
		}
	}
	move()
	follow := exec.Command(binary, "log", "--follow", "--json", "--server", s.admin)
	out, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = follow.Process.Kill(); _ = follow.Wait() })
	shown := make(chan int64, 1000)
	go func() {
		defer close(shown)
		for scan := bufio.NewScanner(out); scan.Scan(); {
			var e struct{ Index int64 }
			if err := json.Unmarshal(scan.Bytes(), &e); err != nil {
				t.Errorf("%v in %q", err, scan.Text())
				return
			}
			shown <- e.Index
		}
	}()
	var last int64
	for began := time.Now(); last == 0 && time.Since(began) < 10*time.Second; { // until it follows
		move()
		select {
		case last = <-shown:
		case <-time.After(20 * time.Millisecond):
		}
	}
	s.kill()
	s = serve(t, cfg)
	for range 5 {
		move()
	}
	for last < int64(moves)-1 {
		select {
		case index, ok := <-shown:
			if !ok || index != last+1 {
				t.Fatalf("entry %d is shown after %d", index, last)
			}
			last = index
		case <-time.After(10 * time.Second):
			t.Fatalf("entry %d is not shown, of %d", last+1, moves)
		}
	}
}
