/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package guestconfig

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Difference is a difference between what a node does and what a guest would.
type Difference struct {
	// What says it.
	What string
	// Elsewhere says that a pull of the guest would go to another place than the
	// node's, or fail where the node's does not.
	Elsewhere bool
}

// Compare holds what a guest is configured with against what the node says. A
// registry limits it to that host.
func (r Result) Compare(guest Image, registry string) (found []Difference) {
	add := func(elsewhere bool, format string, args ...any) {
		found = append(found, Difference{What: fmt.Sprintf(format, args...), Elsewhere: elsewhere})
	}
	if guest.RegistryConfig == nil && guest.ConfigurationURI != "" {
		add(r.Image.RegistryConfig != nil, "registries: the guest reads them from %s, which cannot be compared", withoutUser(guest.ConfigurationURI))
	} else {
		for _, probe := range probes(registry, r.Image.RegistryConfig, guest.RegistryConfig) {
			node, theirs := r.Image.RegistryConfig.places(probe), guest.RegistryConfig.places(probe)
			if !slices.Equal(node, theirs) {
				add(true, "%s: the node pulls from %s, the guest from %s", probe, strings.Join(node, ", then "), strings.Join(theirs, ", then "))
			}
		}
	}

	node, theirs := certificates(r.Image.Certificates), certificates(guest.Certificates)
	for der, name := range node {
		if _, ok := theirs[der]; !ok {
			add(true, "authority %s: the node trusts it, the guest does not", name)
		}
	}
	for der, name := range theirs {
		if _, ok := node[der]; !ok && registry == "" {
			add(false, "authority %s: the guest trusts it, the node does not", name)
		}
	}

	var a, b Proxy
	if r.Image.Proxy != nil {
		a = *r.Image.Proxy
	}
	if guest.Proxy != nil {
		b = *guest.Proxy
	}
	b.HTTPS, b.HTTP = withoutUser(b.HTTPS), withoutUser(b.HTTP)
	differ := func(what, node, guest string) {
		if node != guest {
			add(true, "%s: %q for the node, %q for the guest", what, node, guest)
		}
	}
	differ("https_proxy", a.HTTPS, b.HTTPS)
	differ("http_proxy", a.HTTP, b.HTTP)
	if a.HTTPS+a.HTTP+b.HTTPS+b.HTTP != "" {
		differ("no_proxy", sortedList(a.No), sortedList(b.No))
	}
	if r.Credentials && guest.CredentialsURI == "" {
		add(false, "credentials: the node has some, the guest none (authenticated_registry_credentials_uri)")
	}
	slices.SortStableFunc(found, func(a, b Difference) int { return strings.Compare(a.What, b.What) })
	return found
}

// probes are the beginnings of names for which either says something.
func probes(only string, configs ...*RegistryConfig) []string {
	var found []string
	for _, c := range configs {
		if c == nil {
			continue
		}
		if !slices.Equal(c.unqualified(), []string{dockerHub}) {
			found = append(found, dockerHub)
		}
		for _, r := range c.Registries {
			p := r.prefix()
			if host, ok := strings.CutPrefix(p, "*."); ok {
				p = "any." + host
			}
			found = append(found, p)
		}
	}
	if only != "" {
		found = slices.DeleteFunc(found, func(p string) bool { return p != only && !strings.HasPrefix(p, only+"/") })
		// What is said of another registry may catch it.
		found = append(found, only)
	}
	slices.Sort(found)
	return slices.Compact(found)
}

const dockerHub = "docker.io"

func (c *RegistryConfig) unqualified() []string {
	if c == nil || len(c.Unqualified) == 0 {
		return []string{dockerHub}
	}
	return c.Unqualified
}

func (r Registry) prefix() string {
	if r.Prefix == "" {
		return r.Location
	}
	return r.Prefix
}

// places are where images are pulled from whose name begins so, in the order of
// RegistryHandler::process in image-rs/src/registry/mod.rs.
func (c *RegistryConfig) places(name string) (places []string) {
	names := []string{name}
	if rest, ok := strings.CutPrefix(name, dockerHub); ok && (rest == "" || rest[0] == '/') {
		names = nil
		for _, host := range c.unqualified() {
			names = append(names, host+rest)
		}
	}
	for _, name := range names {
		rule, rest, ok := c.rule(name)
		switch {
		case !ok:
			places = append(places, name+" by HTTPS")
		case rule.Blocked:
		default:
			for _, m := range rule.Mirrors {
				places = append(places, place(m.Location+rest, m.Insecure))
			}
			if rule.Location == "" {
				places = append(places, place(name, false))
			} else {
				places = append(places, place(rule.Location+rest, rule.Insecure))
			}
		}
	}
	if len(places) == 0 {
		return []string{"nowhere"}
	}
	return places
}

func place(location string, insecure bool) string {
	if insecure {
		return location + " by plain HTTP"
	}
	return location + " by HTTPS"
}

// rule is that for a name, and what of the name follows the rule's prefix.
func (c *RegistryConfig) rule(name string) (rule Registry, rest string, ok bool) {
	if c == nil {
		return Registry{}, "", false
	}
	end := -1
	for _, r := range c.Registries {
		prefix := r.prefix()
		wildcard := strings.HasPrefix(prefix, "*.")
		prefix = strings.TrimPrefix(prefix, "*")
		at := strings.Index(name, prefix)
		if at < 0 || (wildcard && strings.Contains(name[:at], "/")) {
			continue
		}
		at += len(prefix)
		if at < len(name) && !strings.ContainsRune(":/@", rune(name[at])) {
			continue
		}
		if at >= end {
			rule, end = r, at
		}
	}
	if end < 0 {
		return Registry{}, "", false
	}
	return rule, name[end:], true
}

// certificates names authorities by what they are.
func certificates(texts []string) map[string]string {
	found := map[string]string{}
	for _, text := range texts {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			continue
		}
		name := "(unreadable)"
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			name = fmt.Sprintf("%q (serial %s)", c.Subject.String(), c.SerialNumber)
		}
		found[string(block.Bytes)] = name
	}
	return found
}

func withoutUser(value string) string {
	u, err := url.Parse(value)
	if value == "" || err != nil {
		return ""
	}
	u.User = nil
	return strings.TrimSuffix(u.String(), "/")
}

func sortedList(s string) string {
	var list []string
	for e := range strings.SplitSeq(s, ",") {
		if e = strings.TrimSpace(e); e != "" {
			list = append(list, e)
		}
	}
	slices.Sort(list)
	return strings.Join(slices.Compact(list), ",")
}
