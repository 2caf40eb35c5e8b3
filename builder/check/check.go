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

// Package check finds what on a node would keep a guest-pulled pod from running,
// or would surprise its owner, and says for each finding what is wrong, why it
// matters and what to do.
//
// It only reads: the effective configuration of containerd ([Config]), the host
// ([Host]) and what a running containerd says of itself ([Daemon]). It changes
// nothing on the node and needs no containerd to run.
package check

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Snapshotter is the name of the snapshotter that is checked.
const Snapshotter = "guest-pull"

// PluginURI names the plugin in containerd's configuration.
const PluginURI = "io.containerd.snapshotter.v1." + Snapshotter

// Severity says what a finding means for a pod.
type Severity string

const (
	// Error breaks a pod, or makes it something else than it says.
	Error Severity = "error"
	// Warning breaks some pods, or costs something, or will.
	Warning Severity = "warning"
	// Info is good to know.
	Info Severity = "info"
)

// Finding is one thing that is wrong.
type Finding struct {
	Severity Severity `json:"severity"`
	// Check names what was looked at; it stays the same across versions.
	Check string `json:"check"`
	// Problem says what is wrong, Why why that matters, Remedy exactly what
	// to do about it.
	Problem string `json:"problem"`
	Why     string `json:"why"`
	Remedy  string `json:"remedy"`
}

// Handler is a runtime handler that is mapped to the snapshotter, and what was
// found out about it. What is not known is empty.
type Handler struct {
	Name        string  `json:"name"`
	RuntimeType string  `json:"runtime_type"`
	Shim        string  `json:"shim"`
	Flavour     Flavour `json:"flavour"`
	Version     string  `json:"version"`
	KataConfig  string  `json:"kata_config"`
}

// Input is all that a check looks at.
type Input struct {
	// Config is containerd's effective configuration, or nil with ConfigErr
	// set when containerd cannot load it.
	Config    *Config
	ConfigErr error
	// Host is the machine.
	Host Host
	// Daemon is the containerd that runs.
	Daemon Daemon
	// Patches names the patches that are built into this containerd.
	Patches []string
}

// Daemon is what a running containerd says of itself.
type Daemon struct {
	// Address is where it was asked.
	Address string
	// Err is why it could not be asked; all else is empty then.
	Err error
	// Binary is the path of the running program, Pid its process.
	Binary string
	Pid    uint64
	// HasPlugin says whether it has the snapshotter at all, and PluginErr why
	// that one did not start, if so.
	HasPlugin bool
	PluginErr string
	// HasCRI says whether it has the plugin that serves kubelet, and CRIErr why
	// that one did not start, if so.
	HasCRI bool
	CRIErr string
	// EnvErr is why its environment could not be read.
	EnvErr error
	// Images are those that guests pull.
	Images []Image
}

// Image is an image that guests pull.
type Image struct {
	Name string
	// Bytes is the size of its layers as they are in the registry.
	Bytes int64
}

// Report is the result of a check.
type Report struct {
	Handlers []Handler `json:"handlers"`
	Findings []Finding `json:"findings"`
}

// OK says that nothing was found that would break a pod.
func (r Report) OK() bool {
	return !slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Severity == Error })
}

// checker collects findings.
type checker struct {
	Input
	report Report
}

func (c *checker) add(s Severity, check, problem, why, remedy string) {
	c.report.Findings = append(c.report.Findings, Finding{s, check, problem, why, remedy})
}

// Run makes all checks. Findings come in the order error, warning, info. What
// cannot be read because of missing permissions counts as not there, so it
// should run as root.
func Run(ctx context.Context, in Input) Report {
	c := &checker{Input: in, report: Report{Handlers: []Handler{}, Findings: []Finding{}}}
	if in.ConfigErr != nil || in.Config == nil {
		c.add(Error, "config", fmt.Sprintf("containerd cannot load its configuration: %v", in.ConfigErr),
			"containerd does not start, so no pod does", "correct the file; `containerd config dump` shows when it can be loaded")
		return c.report
	}
	c.checkImports()
	c.checkUnknownKeys()
	c.checkProxyPlugin()
	c.checkPlugin()
	c.checkCRI()
	c.checkRoot()
	c.checkHelpers()
	c.checkPatches()
	c.checkHandlers(ctx)
	c.checkTransfer()
	c.checkImages()
	c.checkRegistries()
	c.checkLeftovers()
	c.checkDistributions()
	order := []Severity{Error, Warning, Info}
	slices.SortStableFunc(c.report.Findings, func(a, b Finding) int {
		return slices.Index(order, a.Severity) - slices.Index(order, b.Severity)
	})
	return c.report
}

// section is how a plugin's section is written in config.toml.
func section(uri string, keys ...string) string {
	return "[plugins.'" + uri + "'" + strings.Join(append([]string{""}, keys...), ".") + "]"
}
