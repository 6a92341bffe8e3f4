package admin_test

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/cache"
	"tidemark/proxy/admin"
)

// post calls the API with a body.
func (f *fixture) post(t *testing.T, path, contentType, body string) (int, string) {
	t.Helper()
	resp, err := http.Post(f.url+path, contentType, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// see has upstream answer about a tag.
func (f *fixture) see(t *testing.T, ref audit.Ref, name string) {
	t.Helper()
	_, err := f.ledger.Resolve(t.Context(), ref, func(context.Context, audit.Question) (audit.Observation, error) {
		return audit.Observation{Digest: audittest.Digest(name), MediaType: "application/x", Size: 7}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

var heldRef = audit.Ref{Upstream: "docker.io", Repository: "library/held", Tag: "1"}

// A decision over the API answers with the new state, and is refused with a code
// and a sentence when it makes no sense; then nothing has changed.
func TestDecisionsOverTheAPI(t *testing.T) {
	f := serve(t, 0, "")
	f.see(t, heldRef, "a")
	f.see(t, heldRef, "b")
	a, b, c := audittest.Digest("a"), audittest.Digest("b"), audittest.Digest("c")
	f.gone, f.why = a, errors.New("404 Not Found")
	body := func(ref, digest, reason string) string {
		return fmt.Sprintf(`{"ref":%q,"digest":%q,"reason":%q}`, ref, digest, reason)
	}
	before := len(audittest.Check(t, f.store))
	for _, tt := range []struct {
		action, contentType, body string
		status                    int
		says                      string
	}{
		{"approve", "text/plain", body(heldRef.String(), b.String(), "r"), 415, "application/json"},
		{"approve", "application/x-www-form-urlencoded", "ref=x", 415, "application/json"},
		{"approve", "application/json", "{", 400, "body"},
		{"approve", "application/json", `{"ref":"x","why":"y"}`, 400, "unknown field"},
		{"approve", "application/json", body("nginx", b.String(), "r"), 400, "ref"},
		{"approve", "application/json", body(heldRef.String(), "", "r"), 400, "digest"},
		{"approve", "application/json", body(heldRef.String(), "sha256:zz", "r"), 400, "digest"},
		{"approve", "application/json", body(heldRef.String(), b.String(), ""), 400, "reason"},
		{"approve", "application/json", body("docker.io/library/never:1", b.String(), "r"), 404, "never seen"},
		{"approve", "application/json", body(heldRef.String(), c.String(), "r"), 409, "pending is " + b.String()},
		{"reject", "application/json", body(heldRef.String(), a.String(), "r"), 409, "pending is " + b.String()},
		{"release", "application/json", body(heldRef.String(), "", "r"), 409, "not held by hand"},
		{"release", "application/json", body(heldRef.String(), b.String(), "r"), 400, "a release is of the tag"},
		{"hold", "application/json", body(heldRef.String(), c.String(), "r"), 409, "was never what this tag meant"},
	} {
		status, answer := f.post(t, "/api/v1/tags/"+tt.action, tt.contentType, tt.body)
		if status != tt.status || !strings.Contains(answer, tt.says) {
			t.Errorf("%s %s: %d %s, want %d that says %q", tt.action, tt.body, status, answer, tt.status, tt.says)
		}
	}
	if n := len(audittest.Check(t, f.store)); n != before {
		t.Errorf("what was refused left %d events", n-before)
	}
	var tag admin.Tag
	decide := func(action, digest string) {
		t.Helper()
		status, answer := f.post(t, "/api/v1/tags/"+action, "application/json; charset=utf-8", body(heldRef.String(), digest, "because"))
		tag = admin.Tag{}
		if err := json.Unmarshal([]byte(answer), &tag); status != 200 || err != nil {
			t.Fatalf("%s: %d %s", action, status, answer)
		}
	}
	back := f.gone
	f.gone = b
	if status, answer := f.post(t, "/api/v1/tags/approve", "application/json", body(heldRef.String(), b.String(), "r")); status != 409 || !strings.Contains(answer, "bytes_gone") {
		t.Errorf("what nobody has was approved: %d %s", status, answer)
	}
	if n := len(audittest.Check(t, f.store)); n != before {
		t.Errorf("what was refused left %d events", n-before)
	}
	f.why = cache.ErrNoRoom // upstream has it
	decide("approve", b.String())
	f.gone = back
	if tag.Served != b || tag.Held != nil || tag.Mode != audit.HoldMode || tag.Rule != "careful" {
		t.Errorf("approved: %+v", tag)
	}
	if status, answer := f.post(t, "/api/v1/tags/hold", "application/json", body(heldRef.String(), a.String(), "back")); status != 409 || !strings.Contains(answer, "bytes_gone") {
		t.Errorf("back to what nobody has: %d %s", status, answer)
	}
	f.gone = ""
	decide("hold", a.String())
	if tag.Served != a || tag.Held == nil || tag.Held.Digest != b || tag.Held.Reason != "because" || !tag.Held.ByHand {
		t.Errorf("held by hand: %+v %+v", tag, tag.Held)
	}
	var list admin.TagList
	if status, answer := f.get(t, "/api/v1/tags?held=true"); status != 200 || json.Unmarshal([]byte(answer), &list) != nil || len(list.Tags) != 1 || list.Tags[0].Ref != heldRef.String() {
		t.Errorf("what is held: %d %s", status, answer)
	}
	if status, answer := f.get(t, "/api/v1/tags?held=false"); status != 200 || !strings.Contains(answer, `"tags":[]`) {
		t.Errorf("what is not held: %d %s", status, answer)
	}
	if status, _ := f.get(t, "/api/v1/tags?held=perhaps"); status != 400 {
		t.Errorf("held=perhaps: %d", status)
	}
	decide("release", "")
	if tag.Served != b || tag.Held != nil {
		t.Errorf("released: %+v; want what was served before the hold", tag)
	}
	f.see(t, heldRef, "c")
	if status, metrics := f.get(t, "/metrics"); status != 200 || !strings.Contains(metrics, "tidemark_held_refs 1") {
		t.Error("what the rule holds is not in the metrics")
	}
	decide("reject", c.String())
	if tag.Served != b || tag.Held.Reason != "rejected" {
		t.Errorf("rejected: %+v %+v", tag, tag.Held)
	}
}

// Nothing that a web page of somebody else could send is carried out, and what
// goes on after a call, or is malformed, is no call.
func TestCallsThatAWebPageCouldMake(t *testing.T) {
	f := serve(t, 0, "")
	f.see(t, heldRef, "a")
	body := fmt.Sprintf(`{"ref":%q,"reason":"r"}`, heldRef)
	for name, tt := range map[string]struct {
		host, origin, fetch, body, query string
		status                           int
	}{
		"a call":               {"", "", "", body, "", 200},
		"its own page":         {"", "own", "same-origin", body, "", 200},
		"another origin":       {"", "https://evil.example", "", body, "", 403},
		"another site":         {"", "", "cross-site", body, "", 403},
		"another name":         {"evil.example", "", "", body, "", 403},
		"another name's page":  {"evil.example", "http://evil.example", "same-origin", body, "", 403},
		"something after it":   {"", "", "", body + " {}", "", 400},
		"a query that is none": {"", "", "", body, "?a;b=1", 400},
		"a query half-escaped": {"", "", "", body, "?%zz", 400},
	} {
		req, err := http.NewRequest("POST", f.url+"/api/v1/tags/hold"+tt.query, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		if tt.origin == "own" {
			tt.origin = f.url
		}
		for k, v := range map[string]string{"Origin": tt.origin, "Sec-Fetch-Site": tt.fetch} {
			if v != "" {
				req.Header.Set(k, v)
			}
		}
		req.Host = tt.host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.status {
			t.Errorf("%s: %s, want %d", name, resp.Status, tt.status)
		}
	}
}

// An entry that somebody has changed so that it is no JSON any more is told as
// such, and breaks nothing else.
func TestDamagedEntryIsTold(t *testing.T) {
	f := serve(t, 3, "")
	db, err := sql.Open("sqlite", f.path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(`DROP TRIGGER log_leaf_update; UPDATE log_leaf SET body = CAST('{"v":1,"type' AS BLOB) WHERE idx = 1`); err != nil {
		t.Fatal(err)
	}
	for path, status := range map[string]int{"/api/v1/events": 500, "/api/v1/events/1": 500, "/api/v1/events/2": 200, "/api/v1/events?after=1": 200, "/api/v1/tags": 200} {
		got, answer := f.get(t, path)
		if got != status || status == 500 && !strings.Contains(answer, "entry 1 is not what was sealed") {
			t.Errorf("%s: %d %s, want %d", path, got, answer, status)
		}
	}
}

// What a tag meant is listed newest first, page by page.
func TestHistoryOverTheAPI(t *testing.T) {
	f := serve(t, 9, "")
	path := "/api/v1/tags/history?ref=docker.io/library/app:1&limit=2"
	var got []int64
	for after := ""; ; {
		var page admin.History
		status, answer := f.get(t, path+after)
		if err := json.Unmarshal([]byte(answer), &page); status != 200 || err != nil {
			t.Fatalf("%d %s", status, answer)
		}
		for _, st := range page.History {
			got = append(got, st.Index)
			if st.Bytes != "gone" || st.Basis != "observed" || (st.Ended == nil) != (len(got) == 1) || (st.NotBefore == nil) != (len(got) == 3) {
				t.Errorf("stint %+v", st)
			}
		}
		if page.Next == nil {
			break
		}
		after = fmt.Sprintf("&after=%d", *page.Next)
	}
	if fmt.Sprint(got) != "[7 4 1]" {
		t.Errorf("stints began with %v, want 7, 4, 1", got)
	}
	for q, status := range map[string]int{"?ref=docker.io/library/never:1": 404, "?ref=nginx": 400, "": 400, "?ref=docker.io/a:1&after=x": 400, "?ref=docker.io/a:1&limit=0": 400, "?ref=docker.io/a:1&who=x": 400} {
		if got, answer := f.get(t, "/api/v1/tags/history"+q); got != status {
			t.Errorf("history%s: %d %s, want %d", q, got, answer, status)
		}
	}
}

// Two digests are compared with a ref or without, and what is no digest, or no
// tag ever meant, is told.
func TestDiffOverTheAPI(t *testing.T) {
	f := serve(t, 6, "")
	old, new := audittest.Digest("0"), audittest.Digest("3")
	for q, want := range map[string]int{
		"old=" + old.String() + "&new=" + new.String():                                     200,
		"old=" + old.String() + "&new=" + new.String() + "&ref=docker.io/library/app:0":    200,
		"old=" + old.String() + "&new=" + audittest.Digest("never").String():               200,
		"old=" + audittest.Digest("x").String() + "&new=" + audittest.Digest("y").String(): 404,
		"old=x&new=" + new.String():                                                        400,
		"old=" + old.String():                                                              400,
	} {
		if status, answer := f.get(t, "/api/v1/diff?"+q); status != want || want == 200 && !strings.Contains(answer, `"platforms"`) {
			t.Errorf("diff?%s: %d %s, want %d", q, status, answer, want)
		}
	}
}

// Who pulled a digest is told by client, whatever tags they used.
func TestExposureOverTheAPI(t *testing.T) {
	f := serve(t, 1, "")
	d := audittest.Digest("0")
	rows := []audit.Exposure{
		{Digest: d, Client: "10.0.0.1", Ref: "docker.io/library/app:0", First: noon.Add(time.Hour), Last: noon.Add(2 * time.Hour), Resolves: 2, Fetches: 1},
		{Digest: d, Client: "10.0.0.1", Ref: "docker.io/library/app:1", First: noon, Last: noon, Resolves: 1},
		{Digest: d, Client: "10.0.0.2", Ref: "docker.io/library/app", First: noon, Last: noon, Fetches: 5},
	}
	if err := f.store.AddExposures(t.Context(), rows); err != nil {
		t.Fatal(err)
	}
	var x admin.Exposure
	status, answer := f.get(t, "/api/v1/exposure?digest="+d.String())
	if err := json.Unmarshal([]byte(answer), &x); status != 200 || err != nil || x.Total != 2 {
		t.Fatalf("%d %s", status, answer)
	}
	if c := x.Clients[0]; c.Client != "10.0.0.1" || len(c.Refs) != 2 || c.Resolves != 3 || c.Fetches != 1 || !c.First.Equal(noon) || !c.Last.Equal(noon.Add(2*time.Hour)) {
		t.Errorf("the first client: %+v", c)
	}
	if status, answer := f.get(t, "/api/v1/exposure?digest="+audittest.Digest("never").String()); status != 200 || !strings.Contains(answer, `"clients":[]`) {
		t.Errorf("what nobody pulled: %d %s", status, answer)
	}
	if status, _ := f.get(t, "/api/v1/exposure?digest=latest"); status != 400 {
		t.Errorf("a tag for a digest: %d", status)
	}
	if status, answer := f.get(t, "/api/v1/conditions"); status != 200 || !strings.Contains(answer, `"conditions":[]`) {
		t.Errorf("conditions: %d %s", status, answer)
	}
}

// A policy is tried on what is recorded, without changing anything.
func TestPolicyIsTriedOut(t *testing.T) {
	f := serve(t, 0, "")
	f.see(t, heldRef, "a")
	f.see(t, heldRef, "b")
	var r admin.PolicyResult
	status, answer := f.post(t, "/api/v1/policy/test", "application/json", `{}`)
	if err := json.Unmarshal([]byte(answer), &r); status != 200 || err != nil || len(r.Held) != 1 || r.Counts[audit.HoldMode] != 1 || r.Held[0].Rule != "careful" || r.Held[0].Until != nil {
		t.Errorf("the present policy: %d %s", status, answer)
	}
	if status, answer := f.post(t, "/api/v1/policy/test", "application/json", `{"config":"rubbish"}`); status != 400 || !strings.Contains(answer, "line 1") {
		t.Errorf("a policy that is none: %d %s", status, answer)
	}
	if status, answer := f.post(t, "/api/v1/policy/test", "application/json", `{"since":"2999-01-01T00:00:00Z"}`); status != 200 || !strings.Contains(answer, "careful") {
		t.Errorf("what is still held then: %d %s", status, answer)
	}
}

// Whoever follows the log gets every event once, verbatim, as it is recorded, and
// after a cut from where it was.
func TestLogIsFollowed(t *testing.T) {
	f := serve(t, 5, "")
	follow := func(path string, last string) *bufio.Scanner {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", f.url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if last != "" {
			req.Header.Set("Last-Event-ID", last)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil || resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
			t.Fatalf("%v, %v", resp, err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return bufio.NewScanner(resp.Body)
	}
	next := func(s *bufio.Scanner) (id string, e admin.Event) {
		t.Helper()
		for s.Scan() {
			if v, ok := strings.CutPrefix(s.Text(), "id: "); ok {
				id = v
			}
			if v, ok := strings.CutPrefix(s.Text(), "data: "); ok {
				if err := json.Unmarshal([]byte(v), &e); err != nil {
					t.Fatal(err)
				}
				return id, e
			}
		}
		t.Fatal(s.Err())
		return
	}
	s := follow("/api/v1/events/stream?ref="+heldRef.String(), "")
	f.see(t, heldRef, "a")
	f.see(t, audittest.Ref("other"), "x")
	f.see(t, heldRef, "b")
	for _, want := range []int64{5, 7, 8} {
		id, e := next(s)
		leaves, err := f.store.Leaves(t.Context(), want, 1)
		if err != nil {
			t.Fatal(err)
		}
		if id != fmt.Sprint(want) || e.Index != want || !bytes.Equal(e.Leaf, leaves[0]) {
			t.Errorf("event %s, %d: %s; want %d: %s", id, e.Index, e.Leaf, want, leaves[0])
		}
	}
	again := follow("/api/v1/events/stream", "6")
	if id, _ := next(again); id != "7" {
		t.Errorf("after a cut it goes on with %s, want 7", id)
	}
	for _, bad := range []string{"?type=tag.eaten", "?ref=x", "?after=x", "?colour=blue"} {
		if status, answer := f.get(t, "/api/v1/events/stream"+bad); status != 400 {
			t.Errorf("stream%s: %d %s", bad, status, answer)
		}
	}
}

// The description of the API has every route that there is, and no other.
func TestDescriptionOfTheAPIIsTrue(t *testing.T) {
	f := serve(t, 1, "")
	_, answer := f.get(t, "/api/v1/openapi.json")
	var doc struct {
		OpenAPI string
		Paths   map[string]map[string]any
	}
	if err := json.Unmarshal([]byte(answer), &doc); err != nil || !strings.HasPrefix(doc.OpenAPI, "3.") {
		t.Fatalf("%v: %.200s", err, answer)
	}
	source, err := os.ReadFile("admin.go")
	if err != nil {
		t.Fatal(err)
	}
	routes := make(map[string]bool)
	for _, m := range regexp.MustCompile(`"(GET|POST) (/api/v1/[^"]*)"(\+action)?`).FindAllStringSubmatch(string(source), -1) {
		paths := []string{m[2]}
		if m[3] != "" {
			paths = nil
			for _, a := range []string{audit.Approve, audit.Reject, audit.HoldAt, audit.Release} {
				paths = append(paths, m[2]+a)
			}
		}
		for _, p := range paths {
			routes[m[1]+" "+p] = true
			if doc.Paths[p][strings.ToLower(m[1])] == nil {
				t.Errorf("%s %s is not described", m[1], p)
			}
		}
	}
	for p, methods := range doc.Paths {
		for m := range methods {
			if !routes[strings.ToUpper(m)+" "+p] {
				t.Errorf("%s %s is described, and is not there", m, p)
			}
		}
	}
}
