package upstream

import (
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// anyParameter is how a client may look for the parameters of a challenge without
// parsing it.
var anyParameter = regexp.MustCompile(`(\w+)="([^"]*)"`)

// Whatever an upstream asks a client for, what is told to the client says the same
// to everybody who reads it: the realm that was checked, the service and scope that
// were understood, and no other.
func FuzzChallenge(f *testing.F) {
	for _, seed := range [][2]string{
		{`Bearer realm="https://auth.hub.example/token",service="hub",scope="repository:a:pull,push",error="invalid_token"`, ``},
		{`Bearer realm="https://hub.example/token"`, `Basic realm="hub"`},
		{`Basic realm="x", Bearer realm="https://hub.example/token",service=hub`, ``},
		{`Bearer realm="https://hub.example/token",service=a" realm="https://evil.example/token`, ``},
		{`Bearer realm="https://hub.example/token",service="x\",scope=" realm=\"https://evil.example/token`, ``},
		{`Bearer realm="https://hub.example/token",service=x",scope=",realm=https://evil.example/,"`, ``},
		{`Bearer realm="https://hub.example/token",scope="a` + "\r\nSet-Cookie: x=y" + `"`, ``},
		{`Bearer realm="https://hub.example/token",service="a` + "\n" + `b",error="` + "\x00" + `"`, ``},
		{`Bearer realm=https://hub.example/token" realm="https://evil.example/`, ``},
		{`Bearer realm="https://evil.example/token"`, `Bearer realm="https://hub.example/token"`},
		{`Bearer realm="https://hub.example/token", realm="https://evil.example/token"`, ``},
		{`Bearer realm="https://hub.example@evil.example/token"`, ``},
		{`Bearer realm="http://hub.example/token"`, ``},
		{`Bearer realm = "https://hub.example/token" , service = "hub"`, ``},
		{`Bearer realm=" https://hub.example/token ",service=" "`, ``},
		{`Negotiate, Digest realm="x", Bearer`, ``},
		{`Bearer realm="https://hub.example/token?x=` + "\u00a0" + `",service=` + "\u2028" + `a`, ``},
		{`,,=,"`, `Basic`},
	} {
		f.Add(seed[0], seed[1])
	}
	asked := &url.URL{Scheme: "https", Host: "hub.example", Path: "/v2/app/manifests/1"}
	t := New(Options{Name: "hub", Endpoints: []*url.URL{{Scheme: "https", Host: "hub.example"}}}).auth
	f.Fuzz(func(tt *testing.T, first, second string) {
		headers := []string{first, second}
		told, err := t.relayed(&http.Response{Header: http.Header{"Www-Authenticate": headers}, Request: &http.Request{URL: asked}})
		if err != nil {
			if told != nil {
				tt.Fatalf("%q is told as %q and refused: %v", headers, told, err)
			}
			return
		}
		bearer, basic := parseChallenges(headers)
		again, basicAgain := parseChallenges(told)
		if basic != basicAgain || (bearer == nil) != (again == nil) {
			tt.Fatalf("%q is told as %q: Bearer %v became %v, Basic %t became %t", headers, told, bearer, again, basic, basicAgain)
		}
		for _, k := range []string{"realm", "service", "scope"} {
			if bearer[k] != again[k] {
				tt.Fatalf("%q is told as %q: %s %q became %q", headers, told, k, bearer[k], again[k])
			}
		}
		if again != nil {
			if _, err := t.checkRealm(asked, again["realm"]); err != nil {
				tt.Fatalf("%q is told as %q: %v", headers, told, err)
			}
		}
		for _, line := range told {
			if strings.ContainsAny(line, "\r\n\x00\\") || strings.Count(line, `"`)%2 != 0 {
				tt.Fatalf("%q is told as %q, which can be read in more than one way", headers, line)
			}
			if !strings.HasPrefix(line, "Bearer ") {
				if line != `Basic realm="hub.example"` {
					tt.Fatalf("%q is told as %q", headers, line)
				}
				continue
			}
			read := make(map[string]string)
			for _, kv := range anyParameter.FindAllStringSubmatch(line, -1) {
				if other, twice := read[kv[1]]; twice {
					tt.Fatalf("%q is told as %q, in which %s is %q and %q", headers, line, kv[1], other, kv[2])
				}
				read[kv[1]] = kv[2]
			}
			if !reflect.DeepEqual(read, again) {
				tt.Fatalf("%q is told as %q, in which one reads %v and another %v", headers, line, read, again)
			}
		}
	})
}
