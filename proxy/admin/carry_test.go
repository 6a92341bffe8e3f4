package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/proxy/admin"
)

// worker does what the server's own parts do, and remembers what it was asked.
type worker struct {
	fails   error // what every call returns
	target  admin.Target
	warmed  admin.WarmRequest
	export  admin.ExportRequest
	trusted string
	bundle  string
	late    bool // an export fails after it has begun
}

func (w *worker) Image(_ context.Context, d digest.Digest, platforms []string, verify bool) (admin.Image, error) {
	im := admin.Image{Digest: d, Platforms: []admin.Platform{{Platform: "linux/amd64", Complete: d == audittest.Digest("3"), Bytes: 7, Missing: []admin.Missing{}}}}
	if verify {
		im.Platforms[0].Bytes = 8
	}
	return im, w.fails
}

func (w *worker) touch(_ context.Context, t admin.Target) (admin.Touched, error) {
	w.target = t
	return admin.Touched{Digests: []digest.Digest{audittest.Digest("x")}, Bytes: 9}, w.fails
}

func (w *worker) Pin(ctx context.Context, t admin.Target) (admin.Touched, error) {
	return w.touch(ctx, t)
}
func (w *worker) Unpin(ctx context.Context, t admin.Target) (admin.Touched, error) {
	return w.touch(ctx, t)
}
func (w *worker) Remove(ctx context.Context, t admin.Target) (admin.Touched, error) {
	return w.touch(ctx, t)
}

func (w *worker) Scrub(_ context.Context, rate int64, tell func(admin.ScrubProgress)) (admin.ScrubReport, error) {
	if w.fails == nil {
		tell(admin.ScrubProgress{Checked: 1, Bytes: rate, Total: 20})
	}
	return admin.ScrubReport{Checked: 2, Bytes: 20, Wrong: []admin.Wrong{{Digest: audittest.Digest("x"), Action: "removed"}}}, w.fails
}

func (w *worker) Warm(_ context.Context, q admin.WarmRequest, tell func(admin.WarmProgress)) (admin.WarmReport, error) {
	w.warmed = q
	for _, ref := range q.Refs {
		tell(admin.WarmProgress{Ref: ref, Have: 1, Total: 2})
	}
	return admin.WarmReport{Complete: true, Filled: 2, Bytes: 20}, w.fails
}

func (w *worker) Export(_ context.Context, out io.Writer, q admin.ExportRequest) error {
	w.export = q
	if w.fails != nil && !w.late {
		return w.fails
	}
	if _, err := io.WriteString(out, strings.Repeat("tar", 4096)); err != nil {
		return err
	}
	return w.fails
}

func (w *worker) Import(_ context.Context, r io.Reader, trust string) (admin.ImportReport, error) {
	b, err := io.ReadAll(r)
	w.bundle, w.trusted = string(b), trust
	return admin.ImportReport{Origin: "there", Refs: []admin.ImportedRef{{Ref: "docker.io/library/app:1", Became: "new"}}}, errors.Join(err, w.fails)
}

func (f *fixture) call(t *testing.T, path, contentType, body string) (int, string, error) {
	t.Helper()
	resp, err := http.Post(f.url+path, contentType, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// Images are listed page by page, filtered by whether they are complete.
func TestImagesAreListed(t *testing.T) {
	f := serve(t, 6, "") // refs 0 to 2, the last of which mean digests 3, 4 and 5
	for path, want := range map[string]string{
		"/api/v1/cache/images":                                       "0 1 2",
		"/api/v1/cache/images?complete=true":                         "0",
		"/api/v1/cache/images?complete=false&limit=1":                "1 next=1",
		"/api/v1/cache/images?limit=2&after=docker.io/library/app:0": "1 2",
		"/api/v1/cache/images?match=docker.io/library/app:2":         "2",
	} {
		status, answer := f.get(t, path)
		var list admin.ImageList
		if err := json.Unmarshal([]byte(answer), &list); status != 200 || err != nil {
			t.Fatalf("%s: %d %s", path, status, answer)
		}
		var got []string
		for _, im := range list.Images {
			got = append(got, im.Ref[strings.LastIndex(im.Ref, ":")+1:])
		}
		if list.Next != "" {
			got = append(got, "next="+list.Next[strings.LastIndex(list.Next, ":")+1:])
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", path, got, want)
		}
	}
	if _, answer := f.get(t, "/api/v1/cache/images?verify=true&limit=1"); !strings.Contains(answer, `"bytes":8`) {
		t.Errorf("verified: %s", answer)
	}
	for _, bad := range []string{"complete=perhaps", "verify=2", "after=x", "match=[", "platform=Linux", "limit=0", "other=1"} {
		if status, answer := f.get(t, "/api/v1/cache/images?"+bad); status != 400 {
			t.Errorf("%s: %d %s", bad, status, answer)
		}
	}
}

// What is to be pinned, unpinned or removed is a ref or a digest, parsed at the edge.
func TestTargetsAreParsed(t *testing.T) {
	f := serve(t, 0, "")
	for _, call := range []string{"pin", "unpin", "remove"} {
		status, answer, _ := f.call(t, "/api/v1/cache/"+call, "application/json", `{"target":"docker.io/library/app:1","platforms":["linux/amd64"],"reason":"r"}`)
		if status != 200 || f.worker.target.Ref != audittest.Ref("1") || f.worker.target.Digest != "" || !strings.Contains(answer, `"bytes":9`) || !strings.Contains(answer, `"missing":[]`) {
			t.Errorf("%s a ref: %d %s, %+v", call, status, answer, f.worker.target)
		}
		d := audittest.Digest("x").String()
		status, answer, _ = f.call(t, "/api/v1/cache/"+call, "application/json", `{"target":"`+d+`"}`)
		if status != 200 || f.worker.target.Digest.String() != d || f.worker.target.Ref != (audit.Ref{}) {
			t.Errorf("%s a digest: %d %s, %+v", call, status, answer, f.worker.target)
		}
		f.worker.target = admin.Target{}
		for _, bad := range []string{`{}`, `{"target":"nginx"}`, `{"target":"sha256:ab"}`, `{"target":"docker.io/library/app:1","platforms":["x"]}`, `{"target":"docker.io/library/app:1","ref":"x"}`, `[]`} {
			if status, answer, _ := f.call(t, "/api/v1/cache/"+call, "application/json", bad); status != 400 || f.worker.target.Target != "" {
				t.Errorf("%s %s: %d %s", call, bad, status, answer)
			}
		}
		if status, _, _ := f.call(t, "/api/v1/cache/"+call, "text/plain", `{}`); status != 415 {
			t.Errorf("%s as a web page could: %d", call, status)
		}
	}
}

// A long call tells how far it is line by line, and ends with what came of it, or why
// nothing did.
func TestLongCallsTellHowFarTheyAre(t *testing.T) {
	f := serve(t, 0, "")
	status, answer, _ := f.call(t, "/api/v1/warm", "application/json", `{"refs":["docker.io/library/app:1"],"platforms":[]}`)
	lines := strings.Split(strings.TrimSpace(answer), "\n")
	if status != 200 || len(lines) != 2 || !strings.Contains(lines[0], `"have":1`) || lines[1] != `{"done":true,"complete":true,"filled":2,"bytes":20,"failed":[]}` {
		t.Errorf("warm: %d %s", status, answer)
	}
	if f.worker.warmed.Platforms != nil {
		t.Errorf("no platforms are all: %v", f.worker.warmed.Platforms)
	}
	status, answer, _ = f.call(t, "/api/v1/cache/scrub", "application/json", `{"rate":5}`)
	lines = strings.Split(strings.TrimSpace(answer), "\n")
	if status != 200 || len(lines) != 2 || lines[0] != `{"checked":1,"bytes":5,"total":20}` || !strings.HasPrefix(lines[1], `{"done":true,"checked":2,`) || !strings.Contains(lines[1], `"action":"removed"`) {
		t.Errorf("scrub: %d %s", status, answer)
	}
	f.worker.fails = &admin.Error{Status: 409, Code: "busy", Message: "no"}
	if status, answer, _ := f.call(t, "/api/v1/cache/scrub", "application/json", `{}`); status != 409 {
		t.Errorf("an error before it has begun: %d %s", status, answer)
	}
	if status, answer, _ := f.call(t, "/api/v1/warm", "application/json", `{"refs":["docker.io/library/app:1"]}`); status != 200 || !strings.HasSuffix(answer, `{"error":{"code":"busy","message":"no"}}`+"\n") {
		t.Errorf("an error after it has begun: %d %s", status, answer)
	}
	for path, bad := range map[string]string{"/api/v1/warm": `{"refs":[]}`, "/api/v1/cache/scrub": `{"rate":-1}`, "/api/v1/export": `{"refs":[]}`} {
		if status, answer, _ := f.call(t, path, "application/json", bad); status != 400 {
			t.Errorf("%s: %d %s", path, status, answer)
		}
	}
}

// A bundle is whole, or the client learns that it is not.
func TestAnExportIsWholeOrCutOff(t *testing.T) {
	f := serve(t, 0, "")
	ask := `{"refs":["docker.io/library/app:1","docker.io/library/app:1"],"since":{"log_size":3,"refs":["docker.io/library/app:2"],"content":[]}}`
	status, answer, err := f.call(t, "/api/v1/export", "application/json", ask)
	if status != 200 || err != nil || len(answer) != 3*4096 || len(f.worker.export.Parsed) != 1 || f.worker.export.Since.Parsed[0] != audittest.Ref("2") {
		t.Errorf("%d %v, %d bytes, %+v", status, err, len(answer), f.worker.export)
	}
	f.worker.fails = &admin.Error{Status: 409, Code: "unfit", Message: "it is not here"}
	if status, answer, _ := f.call(t, "/api/v1/export", "application/json", ask); status != 409 || !strings.Contains(answer, "it is not here") {
		t.Errorf("nothing was written yet: %d %s", status, answer)
	}
	f.worker.late = true
	if status, answer, err := f.call(t, "/api/v1/export", "application/json", ask); err == nil {
		t.Errorf("it failed in the middle, and the client got %d and %d bytes without an error", status, len(answer))
	}
	for _, bad := range []string{`{"refs":["nginx"]}`, `{"refs":["docker.io/library/app:1"],"since":{"log_size":-1}}`, `{"refs":["docker.io/library/app:1"],"platforms":["x"]}`} {
		if status, answer, _ := f.call(t, "/api/v1/export", "application/json", bad); status != 400 {
			t.Errorf("%s: %d %s", bad, status, answer)
		}
	}
}

// A bundle is handed on as it comes, with the key that must have signed it.
func TestAnImportIsHandedOn(t *testing.T) {
	f := serve(t, 0, "")
	status, answer, _ := f.call(t, "/api/v1/import?trust=there%2Bkey", "application/x-tar", "a tar")
	if status != 200 || f.worker.bundle != "a tar" || f.worker.trusted != "there+key" || !strings.Contains(answer, `"became":"new"`) {
		t.Errorf("%d %s, %+v", status, answer, f.worker)
	}
	for contentType, want := range map[string]int{"application/json": 415, "application/x-tar": 422} {
		f.worker.fails = &admin.Error{Status: 422, Code: "wrong_bundle", Message: "blobs/sha256/ab: no"}
		if status, answer, _ := f.call(t, "/api/v1/import", contentType, "a tar"); status != want {
			t.Errorf("%s: %d %s", contentType, status, answer)
		}
	}
}

// The past of a ref is asked for by a time or a place, and what is not known says from
// when on something is.
func TestThePastOfARef(t *testing.T) {
	f := serve(t, 6, "")
	for query, want := range map[string]string{
		"at=0": "200 " + audittest.Digest("0").String(), "at=5": "200 " + audittest.Digest("3").String(),
		"asof=2026-07-01T12:00:00Z": "200 " + audittest.Digest("0").String(), "asof=2026-07-02": "200 " + audittest.Digest("3").String(),
		"asof=2026-07-01": "404 something is known from 2026-07-01T12:00:00Z on", "at=6": "404 yet to come",
		"at=-1": "400 at", "asof=yesterday": "400 asof", "": "400 asof", "at=1&asof=2026-07-02": "400 asof",
	} {
		status, answer := f.get(t, "/api/v1/tags/asof?ref=docker.io/library/app:0&"+query)
		wantStatus, wantText, _ := strings.Cut(want, " ")
		if http.StatusText(status) != http.StatusText(map[string]int{"200": 200, "404": 404, "400": 400}[wantStatus]) || !strings.Contains(answer, wantText) {
			t.Errorf("%s: %d %s, want %s", query, status, answer, want)
		}
	}
}
