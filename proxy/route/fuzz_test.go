package route_test

import (
	"errors"
	"strings"
	"testing"

	"tidemark/proxy/route"
)

// Whatever a request says of host, ns and name, it means a repository of an upstream
// that is configured, by a name that the request itself gave, or nothing.
func FuzzRoute(f *testing.F) {
	for _, seed := range []struct {
		host, ns string
		hasNS    bool
		name     string
	}{
		{"mirror:5050", "", false, "nginx"}, {"ghcr.io:443", "", false, "org/app"}, {"[::1]:5050", "", false, "ghcr.io/org/app"}, {"HUB.example:8443", "", false, "docker.io/library/nginx"},
		{"mirror", "ghcr.io", true, "app"}, {"mirror", "", true, "app"}, {"ghcr.io", "169.254.169.254", true, "x"}, {"mirror", "ghcr.io@evil.example", true, "app"},
		{"mirror", "", false, "169.254.169.254/latest/meta-data"}, {"mirror", "", false, "evil.example:80/app"}, {"localhost:5000", "", false, "/"}, {"mirror", "", false, "internal/"},
		{"", "", false, ""}, {"ghcr.io:", "ghcr.io:443", true, "ghcr.io/ghcr.io/ghcr.io"}, {"ghcr.io\x00", "gHcR.İo", true, "library/../x"}, {"user@ghcr.io", "", false, "DOCKER.IO/nginx"},
	} {
		f.Add(seed.host, seed.ns, seed.hasNS, seed.name)
	}
	configured := map[string]bool{"docker.io": true, "ghcr.io": true, "localhost:5000": true, "internal": true}
	f.Fuzz(func(t *testing.T, host, ns string, hasNS bool, name string) {
		for _, fallback := range []string{"docker.io", "ghcr.io"} {
			tab := table(t, fallback)
			got, err := tab.Route(host, ns, hasNS, name)
			alone, aloneErr := tab.Upstream(host, ns, hasNS)
			for _, err := range []error{err, aloneErr} {
				var unknown *route.ErrUnknown
				if err != nil && (!errors.As(err, &unknown) || len(err.Error()) > 4000) {
					t.Fatalf("Host %q, ns %q, %q: %T %v", host, ns, name, err, err)
				}
			}
			if aloneErr == nil && !configured[alone] || aloneErr != nil && (alone != "" || !hasNS) {
				t.Fatalf("Host %q, ns %q means the upstream %q, %v", host, ns, alone, aloneErr)
			}
			if err != nil {
				if got != (route.Target{}) {
					t.Fatalf("Host %q, ns %q, %q means %+v and is refused: %v", host, ns, name, got, err)
				}
				continue
			}
			if !configured[got.Upstream] || got.Name != name {
				t.Fatalf("Host %q, ns %q, %q means %+v, which is not configured or has another name", host, ns, name, got)
			}
			asks := strings.TrimPrefix(got.Repository, "library/")
			if got.Repository != name && name != got.Upstream+"/"+got.Repository && (got.Upstream != "docker.io" || strings.Contains(asks, "/") || asks != name && name != "docker.io/"+asks) {
				t.Fatalf("Host %q, ns %q, %q asks %s for %q", host, ns, name, got.Upstream, got.Repository)
			}
			if hasNS && (aloneErr != nil || alone != got.Upstream) {
				t.Fatalf("ns %q means %s with a name, and %q, %v without", ns, got.Upstream, alone, aloneErr)
			}
			if again, err := tab.Route(host, ns, hasNS, name); err != nil || again != got {
				t.Fatalf("Host %q, ns %q, %q means %+v, and %+v when asked again", host, ns, name, got, again)
			}
		}
	})
}
