// Reads out the curves under the pointer, and the text of points: by mouse, touch or keyboard.
const tip=document.getElementById("tip");
function show(text,x,y){tip.textContent=text;tip.style.visibility="visible";
 const w=tip.offsetWidth,h=tip.offsetHeight;
 tip.style.left=Math.max(8,Math.min(x+14,innerWidth-w-8))+"px";
 tip.style.top=(y-h-12>0?y-h-12:y+16)+"px"}
function hide(){tip.style.visibility="hidden"}
for(const svg of document.querySelectorAll("svg[data-lines]")){
 const lines=JSON.parse(svg.dataset.lines),hair=svg.querySelector(".hair"),box=svg.viewBox.baseVal;
 svg.addEventListener("pointermove",e=>{
  const r=svg.getBoundingClientRect(),at=(e.clientX-r.left)/r.width*box.width;
  const near=lines.map(l=>l.points.reduce((a,p)=>Math.abs(p[0]-at)<Math.abs(a[0]-at)?p:a));
  const best=near.reduce((a,p)=>Math.abs(p[0]-at)<Math.abs(a[0]-at)?p:a);
  hair.setAttribute("transform","translate("+best[0]+" 0)");hair.style.visibility="visible";
  show("step "+best[1]+"\n"+lines.map((l,i)=>l.name+": "+near[i][2]+
   (near[i][1]===best[1]?"":" (step "+near[i][1]+")")).join("\n"),e.clientX,e.clientY)});
 svg.addEventListener("pointerleave",()=>{hair.style.visibility="hidden";hide()})}
for(const dot of document.querySelectorAll("[data-tip]")){
 const at=()=>{const r=dot.getBoundingClientRect();show(dot.dataset.tip,r.right,r.top)};
 dot.addEventListener("pointerenter",at);dot.addEventListener("focus",at);
 dot.addEventListener("pointerleave",hide);dot.addEventListener("blur",hide)}
