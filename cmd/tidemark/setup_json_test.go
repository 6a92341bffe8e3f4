package main

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

const mirror = "http://127.0.0.1:5050"

// A mirror is put first into daemon.json, and everything else stays as it is,
// spaces and the order of keys included.
func TestMirrorIsAddedToDaemonJSON(t *testing.T) {
	for _, c := range []struct{ name, old, want string }{
		{"no file", "", "{\n  \"registry-mirrors\": [\"" + mirror + "\"]\n}\n"},
		{"an empty file", " \n", "{\n  \"registry-mirrors\": [\"" + mirror + "\"]\n}\n"},
		{"an empty object", "{}", "{\n  \"registry-mirrors\": [\"" + mirror + "\"]\n}"},
		{"another key", "{\n\t\"debug\":true\n}\n", "{\n\t\"registry-mirrors\": [\"" + mirror + "\"],\n\t\"debug\":true\n}\n"},
		{"on one line", `{"debug": 1e3, "x": "ä\u00e4"}`, `{"registry-mirrors": ["` + mirror + `"], "debug": 1e3, "x": "ä\u00e4"}`},
		{"carriage returns", "{\r\n  \"debug\": true\r\n}\r\n", "{\r\n  \"registry-mirrors\": [\"" + mirror + "\"],\r\n  \"debug\": true\r\n}\r\n"},
		{"an empty list", `{"registry-mirrors": [ ]}`, `{"registry-mirrors": ["` + mirror + `"]}`},
		{"null", `{"registry-mirrors":null}`, `{"registry-mirrors":["` + mirror + `"]}`},
		{"others", `{"registry-mirrors": ["https://a.example"], "log-opts": {"max-size": "1m"}}`, `{"registry-mirrors": ["` + mirror + `", "https://a.example"], "log-opts": {"max-size": "1m"}}`},
		{"others in lines", "{\n  \"registry-mirrors\": [\n    \"https://a.example\"\n  ]\n}", "{\n  \"registry-mirrors\": [\n    \"" + mirror + "\",\n    \"https://a.example\"\n  ]\n}"},
		{"there already", `{ "registry-mirrors" : [ "` + mirror + `" ] }`, ""},
		{"there already, with a slash, not first", `{"registry-mirrors": ["https://a.example", "` + mirror + `/"]}`, ""},
		{"the same key deeper down", `{"x": {"registry-mirrors": ["y"]}}`, `{"registry-mirrors": ["` + mirror + `"], "x": {"registry-mirrors": ["y"]}}`},
	} {
		if c.want == "" {
			c.want = c.old
		}
		got, err := addToList([]byte(c.old), "registry-mirrors", mirror, sameURL)
		if err != nil || string(got) != c.want {
			t.Errorf("%s: %q, %v; want %q", c.name, got, err, c.want)
		}
		again, err := addToList(got, "registry-mirrors", mirror, sameURL)
		if err != nil || !bytes.Equal(again, got) {
			t.Errorf("%s: a second time it becomes %q, %v", c.name, again, err)
		}
	}
}

// What is no such object is refused, and the error says where.
func TestDaemonJSONThatIsNotUnderstoodIsRefused(t *testing.T) {
	for _, c := range []struct{ old, says string }{
		{"{", "line 1, column 1: this is no JSON"},
		{"{\n  \"a\": 1,\n  // comment\n}", "line 3, column 3: this is no JSON"},
		{`{"a": 1} {}`, "line 1, column 10: this is no JSON"},
		{`[]`, "no JSON object"},
		{`{"registry-mirrors": "https://a.example"}`, "line 1, column 22: \"registry-mirrors\" is no list"},
		{`{"registry-mirrors": [1]}`, "is no list of texts"},
		{`{"registry-mirrors": [], "registry-mirrors": []}`, "is there twice"},
	} {
		if got, err := addToList([]byte(c.old), "registry-mirrors", mirror, sameURL); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q became %q, %v; want it refused with %q", c.old, got, err, c.says)
		}
	}
}

// Whatever daemon.json is: if it is taken, what comes out says the same and the
// mirror besides, is longer by what was put in, and is not changed a second time.
func FuzzDaemonJSON(f *testing.F) {
	for _, s := range []string{"", "{}", `{"registry-mirrors": ["x"], "y": [{}]}`, "{\n\t\"registry-mirrors\" :[\r\n\"x\"\r\n]}", `{"registry-mirrors":[""]}`, `{"a":"\ud800"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, old []byte) {
		got, err := addToList(old, "registry-mirrors", mirror, sameURL)
		if err != nil {
			return
		}
		var is, was map[string]any
		if err := json.Unmarshal(got, &is); err != nil {
			t.Fatalf("%q became %q: %v", old, got, err)
		}
		if again, err := addToList(got, "registry-mirrors", mirror, sameURL); err != nil || !bytes.Equal(again, got) {
			t.Fatalf("%q became %q and then %q, %v", old, got, again, err)
		}
		if len(bytes.TrimSpace(old)) == 0 || bytes.Equal(old, got) {
			return
		}
		if err := json.Unmarshal(old, &was); err != nil {
			t.Fatal(err)
		}
		others, _ := was["registry-mirrors"].([]any)
		was["registry-mirrors"] = append([]any{mirror}, others...)
		if !reflect.DeepEqual(is, was) {
			t.Errorf("%q became %q", old, got)
		}
	})
}
